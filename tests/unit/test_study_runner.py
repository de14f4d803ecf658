"""Whatever a stage does, the others go on, what depends on it is skipped, and both are named."""

import json
import os
from pathlib import Path

import pytest

from megatron_ettin.study.arms import Study
from megatron_ettin.study.config import StudyConfig
from megatron_ettin.study.plan import choose
from megatron_ettin.study.runner import Runner
from tests.study_stages import Deed

ENDINGS = {
    "error": "data.txt:3: no number",
    "fault": "KeyError: 'weights'",
    "memory": "out of memory: lower batch sizes",
    "killed": "its process was killed, as the kernel does when memory runs out",
    "nothing": "it ended, but its content is not there",
}


def study_in(folder: Path) -> Study:
    return Study(StudyConfig(output=str(folder), arms={}, evaluation="unused"))


@pytest.mark.slow
def test_a_failure_stops_what_depends_on_it_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_in(tmp_path)
    stages = [
        Deed(study=study, title="first"),
        *(Deed(study=study, title=ending, ending=ending) for ending in ENDINGS),  # type: ignore[arg-type]
        Deed(study=study, title="dependent", after=("killed",)),
        Deed(study=study, title="its dependent", after=("dependent",)),
        Deed(study=study, title="last", after=("first",)),
    ]
    seconds = {stage.name: 1.0 for stage in stages}
    runner = Runner(every=stages, planned_seconds=seconds, estimated_seconds=seconds)
    runner.run(stages)
    messages = {name.removeprefix("deed/"): text for name, text in runner.report.failed.items()}
    assert messages.keys() == ENDINGS.keys()
    assert all(messages[ending].startswith(text) for ending, text in ENDINGS.items())
    assert runner.report.skipped == {
        "deed/dependent": "deed/killed",
        "deed/its dependent": "deed/dependent",
    }
    # One process serves all stages; the stage after the killed one got another.
    processes = {title: (tmp_path / f"{title}.txt").read_text() for title in ("first", "last")}
    assert processes["first"] != processes["last"]
    log = study.stage_file("deed/error").with_suffix(".log").read_text()
    assert f"error in process {processes['first']}" in log
    assert "Traceback" in log
    record = json.loads(study.stage_file("deed/first").read_text())
    assert record["estimated_seconds"] == 1.0
    assert record["seconds"] > 0.0
    printed = capsys.readouterr().out
    assert "deed/dependent: skipped, because deed/killed is not done" in printed
    assert printed.count("deed/first") == 1


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_stages_run_side_by_side_but_for_those_that_run_alone(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    stages = [
        Deed(study=study, title="one", ending="meets", meets="two"),
        Deed(study=study, title="two", ending="meets", meets="one"),
        Deed(study=study, title="all", alone=True),
        Deed(study=study, title="last", after=("one",)),
    ]
    runner = Runner(every=stages, planned_seconds={}, estimated_seconds={}, num_devices=2)
    runner.run(stages)
    assert list(runner.report.as_text()) == ["all stages are done"]
    meeting = [(tmp_path / f"{title}.txt").read_text().split() for title in ("one", "two")]
    assert meeting[0][0] != meeting[1][0]
    # The cores are shared out.
    threads = str(len(os.sched_getaffinity(0)) // 2)
    assert [found[1] for found in meeting] == [threads, threads]
    assert (tmp_path / "all.txt").read_text() == "2"


def test_done_stages_are_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = study_in(tmp_path)
    (tmp_path / "first.txt").write_text("as it was")
    runner = Runner(every=[], planned_seconds={}, estimated_seconds={})
    runner.run([Deed(study=study, title="first", ending="error")])
    assert list(runner.report.as_text()) == ["all stages are done"]
    assert (tmp_path / "first.txt").read_text() == "as it was"
    assert capsys.readouterr().out == ""


def test_a_stage_without_its_input_is_skipped(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    every = [Deed(study=study, title="a"), Deed(study=study, title="b", after=("a",))]
    runner = Runner(every=every, planned_seconds={}, estimated_seconds={})
    runner.run(every[1:])
    assert list(runner.report.as_text()) == ["skipped: deed/b: deed/a is not done"]


def test_patterns_choose_stages_in_order(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    stages = [Deed(study=study, title=title) for title in ("a/one", "b/one", "b/two")]
    chosen = choose(stages, ["deed/b/two", "*/one"])
    assert [stage.title for stage in chosen] == ["a/one", "b/one", "b/two"]
    assert [stage.title for stage in choose(stages, ["deed/b/*"])] == ["b/one", "b/two"]
    with pytest.raises(ValueError, match=r"--only: no stage matches 'deed/c\*'"):
        choose(stages, ["deed/a/one", "deed/c*"])
