"""What a message of a live federation costs beside the work that it asks for.

    OMP_NUM_THREADS=1 python benchmarks/federation_messages.py

A server and a client on loopback, over TLS with keys; the client sends back what it gets. Beside it
stands the start of a process that imports what a client needs: what each message would cost more if
the client were started for it, as Flower does by default.
"""

import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from fedsp.credentials import create_authority, create_node_key, issue_server_certificate
from fedsp.federation_settings import Address
from fedsp.flower_link import FlowerLink
from fedsp.flower_node import FlowerNode

SIZES = (0, 10**5, 10**7, 5 * 10**7)
REPEATS = 7
PORT = 18743


def start_of_a_process() -> float:
    """Return the seconds until a fresh process has imported what a client needs."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import fedsp.client_app, fedsp.cli"], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    ended = threading.Event()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        create_authority(root / "authority")
        issue_server_certificate(root / "authority", root / "server", ["127.0.0.1"])
        create_node_key(root / "client")
        for file, folder in (("ca.crt", "authority"), ("node.pub", "client")):
            data = (root / folder / file).read_bytes()
            place = root / ("client" if file == "ca.crt" else "server/parties")
            place.mkdir(exist_ok=True)
            (place / ("ca.crt" if file == "ca.crt" else "client.pub")).write_bytes(data)
        address = Address("127.0.0.1", PORT)
        link = FlowerLink(root / "server", address, ["client"], print)
        node = FlowerNode(root / "client", address, print)
        thread = threading.Thread(
            target=node.serve, args=(lambda record: record, ended.is_set), daemon=True
        )
        thread.start()
        while "client" not in link.present():
            time.sleep(0.05)
        medians = {}
        for size in SIZES:
            times = []
            for _ in range(REPEATS):
                started = time.perf_counter()
                link.send("client", {"data": bytes(size)})
                while not link.receive(60):
                    pass
                times.append(time.perf_counter() - started)
            medians[size] = statistics.median(times)
        ended.set()
        link.send("client", {"data": b""})
        thread.join(30)
        link.close()
    start = statistics.median(start_of_a_process() for _ in range(3))
    print(f"start of a client process: {start:.2f} s (median of 3)")
    for size, median in medians.items():
        rate = f", {2 * size / median / 1e6:.0f} MB/s" if size else ""
        share = f"{median / start:.2f} of a start"
        print(
            f"{size:>10,} bytes there and back: {median:.2f} s (median of {REPEATS}), {share}{rate}"
        )


if __name__ == "__main__":
    main()
