"""The tokenised example that tasks produce and batches are made of.

No tokeniser and no file lives here.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised example; a prompt with its completion is a multiple choice of one.

    Args:
        prompt_ids: Token ids of what is given.
        completions: Token ids of every choice: one for prompt/completion and for raw text.
        answer: Index of the right choice, 0 for a single completion.
        num_chars: Characters of each choice's text, at least 1 (for length-normalised accuracy).
    """

    prompt_ids: list[int]
    completions: list[list[int]]
    answer: int
    num_chars: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the right completion together."""
        return len(self.prompt_ids) + len(self.completions[self.answer])

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest completion together."""
        return len(self.prompt_ids) + max(len(choice) for choice in self.completions)

    def fit(self, max_tokens: int | None, *, num_leading: int = 0) -> "Example | None":
        """Cut the prompt on the left until every choice fits; a completion is never cut.

        Args:
            max_tokens: Most tokens of the prompt and a completion together, None without limit.
            num_leading: Tokens at the prompt's start that stay whatever is cut (a start token).

        Returns:
            The example itself if it fits, a shortened one, or None if the longest completion leaves
            no room for any of the prompt.
        """
        if max_tokens is None or self.longest <= max_tokens:
            return self
        room = max_tokens - (self.longest - len(self.prompt_ids))
        if room < min(len(self.prompt_ids), num_leading + 1):
            return None
        kept = self.prompt_ids[:num_leading] + self.prompt_ids[num_leading - room :]
        return Example(kept, self.completions, self.answer, self.num_chars)

    @property
    def is_predictable(self) -> bool:
        """Whether every choice has a token that another one comes before."""
        needed = 1 if self.prompt_ids else 2
        return all(len(choice) >= needed for choice in self.completions)
