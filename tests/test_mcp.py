"""The tools as an assistant meets them: the SDK's own client and a real server, over stdio."""

import os
import random
import re
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.server.mcpserver.exceptions import ToolError

from posterity.cli.mcp import _refuse_outside, _text
from posterity.engine.store import Store
from posterity.papers import get
from posterity.site.vendor import vendored

# the command, where torch cannot be imported (the server needs none), and on one core: so trials end in order
START = """
import os, sys
sys.modules["torch"] = None
sys.argv = ["posterity", "mcp"]
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from posterity.cli import main
main()
"""
CHEAP = {"claim": "local_implies_global", "settings": {"max_iter": 3, "n_rows": 300}}


class Assistant:
    """A client in a thread of its own, in a working folder."""

    def __init__(self, portal, client, folder):
        self.portal, self.client, self.folder = portal, client, folder

    def start(self, tool, *, seen=None, **arguments):
        async def progress(done, total, message):
            if seen is not None:
                seen(done, total, message)

        call = partial(self.client.call_tool, tool, arguments, progress_callback=progress)
        return self.portal.start_task_soon(call)

    def answer(self, tool, **arguments):
        """Return what a tool answers, as structure or as text."""
        answer = self.start(tool, **arguments).result()
        assert not answer.is_error, answer.content
        return answer.structured_content or answer.content[0].text

    def error(self, tool, **arguments):
        """Return what a tool says of an error."""
        answer = self.start(tool, **arguments).result()
        assert answer.is_error
        assert answer.structured_content is None
        return answer.content[0].text


@pytest.fixture(scope="module")
def assistant(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mcp")
    work, shared, elsewhere = (folder / name for name in ("work", "shared", "elsewhere"))
    for each in (work, shared, elsewhere):
        each.mkdir()
    table = table_of_houses()
    for path in (work / "houses.csv", shared / "houses.csv", elsewhere / "houses.csv"):
        path.write_text(table)
    (work / "link.csv").symlink_to(elsewhere / "houses.csv")
    (work / "images").mkdir()
    (work / "images" / "link").symlink_to(elsewhere)
    settings = {"POSTERITY_HOME": str(folder / "home"), "POSTERITY_DATA": str(shared)}
    server = StdioServerParameters(
        command=sys.executable, args=["-c", START], cwd=work, env={**os.environ, **settings}
    )
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(Client(stdio_client(server))) as client,
    ):
        yield Assistant(portal, client, folder)


def table_of_houses():
    rng = random.Random(0)
    rows = [(rng.random(), rng.random()) for _ in range(60)]
    return "rooms;size;price\n" + "".join(f"{a};{b};{3 * a - b}\n" for a, b in rows)


def test_every_tool_and_argument_says_what_it_is_for(assistant):
    tools = {tool.name: tool for tool in assistant.portal.call(assistant.client.list_tools).tools}
    assert {name: list(tool.input_schema["properties"]) for name, tool in tools.items()} == {
        "search": ["words"], "show": ["slug"], "run": ["slug", "claim", "seeds", "data", "target", "settings"],
        "compare": ["task", "data", "target", "seeds", "settings"], "results": ["slug"], "vendor": ["slug"],
    }  # fmt: skip
    for tool in tools.values():
        assert len(tool.description) > 60
        assert all(each["description"] for each in tool.input_schema["properties"].values())
    assert "tabular-regression" in tools["compare"].input_schema["properties"]["task"]["description"]


def test_search_show_and_vendor_answer_as_their_commands_do(assistant):
    found = assistant.answer("search", words="overconfident")["papers"]
    assert "esd" in [paper["slug"] for paper in found[:3]]
    shown = assistant.answer("show", slug="esd")
    assert "ESDLoss" in shown["lines"]
    assert shown["claims"][0]["params"]
    assert shown["url"], "fields that the schema does not name are there"
    assert not assistant.answer("show", slug="othello-world")["implemented"]
    assert assistant.answer("vendor", slug="esd") == vendored(get("esd"))


def test_a_run_tells_progress_stops_when_cancelled_and_goes_on_from_what_is_stored(assistant):
    assert assistant.answer("results") == {"verdicts": [], "notes": []}
    told, came = [], threading.Event()

    def seen(*progress):
        told.append(progress)
        if progress[0] >= 2:
            came.set()

    running = assistant.start("run", slug="minibatch-kmeans", seeds=500, seen=seen, **CHEAP)
    assert came.wait(120)
    running.cancel()
    assert told[0][:2] == (1, 500)
    assert re.fullmatch(
        r"minibatch-kmeans local_implies_global seed 0: [\d.]+ s(; about \d+ \w+ left)?", told[0][2]
    )
    store = Store(assistant.folder / "home" / "trials.sqlite")
    time.sleep(1)
    kept = len(store.all())
    (row,) = assistant.answer("results", slug="minibatch-kmeans")["verdicts"]
    assert 2 <= kept == len(store.all()) == len(row["seeds"]) < 500
    answer = assistant.answer("run", slug="minibatch-kmeans", seeds=1, **CHEAP)
    (row,) = answer["verdicts"]
    assert row["seeds"] == [0]
    assert row["params"]["max_iter"] == 3
    assert "1 of 1 trials were stored and not run again" in answer["notes"]
    assert row["verdict"] == "inconclusive"
    assert set(row["effect"]) == {"mean", "ci95"}


def test_compare_ranks_on_a_table_in_the_working_folder(assistant):
    told = []
    answer = assistant.answer(
        "compare",
        task="tabular-regression",
        data="houses.csv",
        target="price",
        seeds=1,
        seen=lambda *each: told.append(each),
    )
    assert answer["ranking"][0]["rank"] == 1
    assert {"linear", "gradient boosting"} <= {place["entry"] for place in answer["ranking"]}
    assert "ordinary choice" in answer["advice"]
    assert "separator ';'" in answer["notes"][0]
    assert "(linear) seed 0" in " ".join(message for _, _, message in told)


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("show", {"slug": "rectified-flwo"}, "did you mean rectified-flow"),
        ("show", {"slug": "--help"}, "unknown paper '--help'"),
        ("search", {"words": " "}, "words must say what you look for"),
        ("vendor", {"slug": "othello-world"}, "not implemented yet"),
        ("results", {"slug": "nope"}, "unknown paper 'nope'"),
        ("run", {"slug": "tangos", "data": "/etc/passwd"}, "got /etc/passwd"),
        ("run", {"slug": "tangos", "data": "../elsewhere/houses.csv?header=no"}, "got ../elsewhere/houses.csv"),
        ("run", {"slug": "tangos", "data": "~"}, f"got {Path.home()}"),
        ("run", {"slug": "tangos", "data": "link.csv"}, "got link.csv"),
        ("run", {"slug": "esd", "data": "images"}, "got images/link"),
        ("compare", {"task": "tabular-regression", "data": "../elsewhere/houses.csv"}, "got ../elsewhere"),
        ("run", {"slug": "tangos", "data": "a\0b"}, "null byte"),
        ("run", {"slug": "tangos", "settings": {"data": "/etc/passwd"}}, "must hold parameters of the claim"),
        ("run", {"slug": "tangos", "seeds": 0}, "greater than or equal to 1"),
        ("run", {"slug": "tangos", "settings": {"": 1}}, "--set must be name=value, got '=1'"),
        ("compare", {"task": "label-noise", "data": "wine", "settings": {"share": 2}}, "share must be at least 0"),
        ("cook", {}, "Unknown tool: cook"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_of_the_tool_and_the_server_goes_on(assistant, tool, arguments, said):
    text = assistant.error(tool, **arguments)
    assert said in text
    assert "Traceback" not in text
    if said.startswith("got "):
        assert f"working folder {assistant.folder / 'work'}" in text
        assert f"POSTERITY_DATA ({assistant.folder / 'shared'})" in text


def test_the_root_is_no_working_folder(monkeypatch):
    monkeypatch.chdir("/")
    monkeypatch.delenv("POSTERITY_DATA", raising=False)
    _refuse_outside("digits")  # a name
    with pytest.raises(
        ToolError, match=r"\(/ does not count\) or in POSTERITY_DATA \(not set\), got /etc/passwd"
    ):
        _refuse_outside("/etc/passwd")


def test_settings_are_written_as_after_set():
    assert [_text(each) for each in (3, 0.5, "cnn", True, None, [2, 0])] == [
        "3",
        "0.5",
        "cnn",
        "true",
        "none",
        "2,0",
    ]


def test_the_server_still_answers(assistant):
    assert assistant.answer("search", words="calibration")["papers"]


def test_without_the_sdk_the_command_says_how_to_install_it(command, monkeypatch):
    monkeypatch.delitem(sys.modules, "posterity.cli.mcp", raising=False)
    for name in ("mcp", "mcp.server.mcpserver"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it now fails
    assert command("mcp") == (2, "", 'posterity: mcp is needed here: pip install "posterity[mcp]"\n')
