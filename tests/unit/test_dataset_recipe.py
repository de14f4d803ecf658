"""`examples/data/ettin.yaml` parses with the published phases and has the paper's mixtures."""

import itertools
import math
from pathlib import Path

import pytest

from megatron_ettin.config import RunConfig, parse_args
from megatron_ettin.order.blend import blend_quotas

EXAMPLES = Path(__file__).parents[2] / "examples"
#: arXiv 2507.11412, Table 2: billions of tokens in pre-training, mid-training and decay.
TABLE = """
arxiv            28.0   4.1   3.0
books             5.3   0.8  10.5
cc_head         356.6     -     -
cc_news           7.3     -     -
code_repos          -     -  20.2
dclm            837.2 175.5  26.0
math                -  10.4   5.0
open_web_math    12.7     -     -
algebraic_stack  12.6     -     -
pes2o            57.3   8.3     -
reddit           80.3   6.2     -
stackexchange    19.6   2.7   4.0
starcoder       263.9  38.4     -
textbooks           -     -   0.5
tulu_flan        16.6   2.4   4.1
wikipedia         7.3   0.5   3.0
"""
TOTALS = {"pretrain": 1704.7, "extension": 249.3, "decay": 76.3}
#: Percent of each phase that the same table prints for its largest sources.
PERCENT = {
    "pretrain": {"dclm": 49.1, "cc_head": 20.9, "starcoder": 15.5, "reddit": 4.7, "books": 0.3},
    "extension": {"dclm": 70.4, "starcoder": 15.4, "math": 4.2, "wikipedia": 0.2},
    "decay": {"dclm": 34.1, "code_repos": 26.5, "books": 13.8, "textbooks": 0.7},
}


def published(*files: str) -> RunConfig:
    names = ["model/150m", "objective/mlm", "hardware/1xh100", *files, "data/ettin"]
    return parse_args([*(f"--config={EXAMPLES / name}.yaml" for name in names), "--run_dir=run"])


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return published(*(f"phase/{phase}" for phase in TOTALS))


def table(phase: str) -> dict[str, float]:
    rows = [line.split() for line in TABLE.split("\n") if line]
    column = list(TOTALS).index(phase) + 1
    return {f"{phase}_{row[0]}": float(row[column]) for row in rows if row[column] != "-"}


@pytest.mark.parametrize("phase", TOTALS)
def test_weights_are_the_tokens_of_the_table(run: RunConfig, phase: str) -> None:
    blend = run.data.blend[phase]
    assert blend == table(phase)
    assert math.isclose(sum(blend.values()), TOTALS[phase], rel_tol=1e-12)


@pytest.mark.parametrize("phase", TOTALS)
def test_rows_have_the_percentages_of_the_table(run: RunConfig, phase: str) -> None:
    blend = run.data.blend[phase]
    quotas = dict(zip(blend, blend_quotas(list(blend.values())), strict=True))
    for name, percent in PERCENT[phase].items():
        share = quotas[f"{phase}_{name}"] / sum(quotas.values())
        assert abs(100 * share - percent) < 0.06, name


def test_each_phase_has_corpora_of_its_own(run: RunConfig) -> None:
    assert [phase.name for phase in run.phases] == list(TOTALS)
    drawn = [name for phase in TOTALS for name in run.data.blend[phase]]
    assert sorted(drawn) == sorted(run.data.sources)
    prefixes = [source.prefix for source in run.data.sources.values()]
    assert len(set(prefixes)) == len(prefixes) == 32
    for phase, name in itertools.product(TOTALS, drawn):
        if name.startswith(f"{phase}_"):
            short = name.removeprefix(f"{phase}_")
            assert run.data.sources[name].prefix == f"corpora/{phase}/{short}_text_document"
    assert {source.specials for source in run.data.sources.values()} == {"present"}


def test_cross_training_has_the_data_of_the_decay() -> None:
    run = published("cross/150m")
    assert run.data.blend["cross"] == run.data.blend["decay"]
