"""Fixtures of several unit tests: a run to ask questions about, and corpora to damage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import TinyCorpus

if TYPE_CHECKING:
    from tests.unit.queried import Queried


@pytest.fixture(scope="session")
def queried(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Queried:
    """Return a run of several epochs that has not ended; no test may change it."""
    from tests.unit.queried import make_queried

    return make_queried(tiny_corpus, tmp_path_factory.mktemp("queried"))


@pytest.fixture
def own_corpus(tiny_corpus: TinyCorpus, tmp_path: Path) -> TinyCorpus:
    """Return a copy of the tiny corpus that a test may change."""
    return tiny_corpus.copy_to(tmp_path / "corpus")
