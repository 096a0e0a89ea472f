"""What a client's site does with what a server asks, and with what goes wrong at its own place."""

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsp.handout import receive_handout
from fedsp.messages import MessageError, ServerBroadcast, encode, encode_handout
from fedsp.partition import Parties
from fedsp.pretrained import BackboneSpec, load_outline
from fedsp.privacy import LocalPrivacy
from fedsp.recipes import WholeModel
from fedsp.backbone import load_backbone, outline_backbone
from fedsp.auxiliary import AuxiliaryRecipe, KeptLayers, SharedCell
from fedsp.compression import LowRank, TrimmedVocabulary
from fedsp.site import ClientSite
from fedsp.sources import Files
from fedsp.wire import Answer, Request, read_answer, to_record
from families import FAMILIES
from parties import NAMES, make_site, server_data, write_party_rows
from tiny import make_client, make_data, make_server, make_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_party_rows(tmp_path_factory.mktemp("rows"))["beta"]


@pytest.fixture(scope="module")
def request_of_round_0(folder: Path) -> Request:
    """What a server would ask beta first."""
    server = make_server(folder)
    server.configure_model()
    auxiliary = server.auxiliary_recipe.build(server.require_model()[0])
    handout = encode_handout(auxiliary.handout())
    return Request(
        request_id="first",
        kind="round",
        client_id=1,
        participations=3,
        terms=ClientSite_terms(),
        handout_sha256=__import__("hashlib").sha256(handout).hexdigest(),
        handout=handout,
        broadcast=encode(ServerBroadcast(0, server.payload()), "float32"),
    )
