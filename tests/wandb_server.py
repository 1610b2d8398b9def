"""A W&B server on the loopback interface: what the real client sends is kept, and can be compared with what was meant.

It answers what wandb asks for runs (online, synchronized, resumed), media, sweeps and saved views. It says nothing
about what W&B's own servers accept or draw.
"""

import base64
import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote

import pytest
import wandb

ENTITY = "us"
_ENTITY = {"id": "E", "name": ENTITY}
_VIEWER = {
    **{"id": "U", "username": ENTITY, "entity": ENTITY, "name": "Us", "email": "us@example.org", "admin": False},
    **{"flags": "{}", "teams": {"edges": []}, "apiKeys": {"edges": []}, "defaultEntity": {"name": ENTITY}},
}


@dataclass
class ServedRun:
    """What arrived of one run."""

    name: str
    project: str
    display_name: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    offsets: list[int] = field(default_factory=list)  # rows that were there when more came
    exit_code: int | None = None

    def series(self, key: str, x: str = "trainer/global_step") -> list[tuple[Any, Any]]:
        return [(row.get(x), row[key]) for row in self.rows if key in row]

    def media(self, key: str) -> list[bytes]:
        return [self.files[value["path"]] for _, value in self.series(key)]

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Metric definitions by name, in wandb's own encoding (its numbers of protobuf fields)."""
        defined = self.config["_wandb"]["value"]["m"]
        return {metric["1"]: metric for metric in defined if "1" in metric}


class WandbServer:
    """Keeps runs, views and sweeps by name."""

    def __init__(self) -> None:
        self.runs: dict[str, ServedRun] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.sweeps: list[dict[str, Any]] = []
        self.artifacts: list[str] = []  # their names; contents are not asked for
        self.jobs: list[dict[str, Any]] = []  # for the agent of a sweep, in the order in which it gets them
        self.projects: set[str] | None = None  # None: every project exists
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_of_wandb": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def start(self) -> None:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        match = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = match[1] if match else "?"
        reply = getattr(self, f"_on_{operation}", None)
        with self._lock:
            if reply is None:
                return {"data": None, "errors": [{"message": f"no answer to {operation}"}]}
            return {"data": reply(variables)}

    def stream(self, path: str, body: dict[str, Any]) -> None:
        """Rows, summary and the end of a run."""
        with self._lock:
            run = self.runs[path.split("/")[-2]]
            for file, chunk in (body.get("files") or {}).items():
                lines = [json.loads(line) for line in chunk["content"]] if file.endswith((".jsonl", ".json")) else []
                if file == "wandb-history.jsonl":
                    run.offsets.append(chunk["offset"])
                    run.rows[chunk["offset"] :] = lines
                elif file == "wandb-summary.json":
                    run.summary = lines[-1]
            if body.get("complete"):
                run.exit_code = body["exitcode"]

    def upload(self, path: str, content: bytes) -> None:
        _, _, name, file = path.split("/", 3)
        with self._lock:
            self.runs[name].files[unquote(file)] = content

    def _on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": _VIEWER}

    _on_GetViewer = _on_ViewerQuery = _on_Viewer

    def _on_ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _on_ServerInfo(self, _: dict[str, Any]) -> dict[str, Any]:
        versions = {"max_cli_version": "99.0.0", "min_cli_version": "0.1"}
        info = {"cliVersionInfo": versions, "latestLocalVersionInfo": None, "features": []}
        return {"serverInfo": info, "viewer": _VIEWER}

    def _on_UpsertBucket(self, sent: dict[str, Any]) -> dict[str, Any]:
        name = sent.get("name") or next(n for n in self.runs if _id(n) == sent["id"])
        new = name not in self.runs
        run = self.runs.setdefault(name, ServedRun(name, sent.get("project") or "uncategorized"))
        run.display_name = sent.get("displayName") or run.display_name or name
        if sent.get("config"):
            run.config.update(json.loads(sent["config"]))
        bucket = {
            **{"id": _id(name), "name": name, "displayName": run.display_name, "description": ""},
            **{"config": json.dumps(run.config), "sweepName": sent.get("sweep"), "historyLineCount": len(run.rows)},
            "project": {"id": "P", "name": run.project, "entity": _ENTITY},
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _on_RunResumeStatus(self, sent: dict[str, Any]) -> dict[str, Any]:
        run, bucket = self.runs.get(sent["name"]), None
        if run:
            telemetry = {"t": run.config.get("_wandb", {}).get("value", {}).get("t")}  # there once a run has started
            bucket = {
                **{"id": _id(run.name), "name": run.name, "displayName": run.display_name, "notes": "", "tags": []},
                **{"config": json.dumps(run.config), "summaryMetrics": json.dumps(run.summary)},
                **{"wandbConfig": json.dumps(telemetry)},
                **{"historyLineCount": len(run.rows), "logLineCount": 0, "eventsLineCount": 0, "sweepName": None},
                **{"historyTail": json.dumps([json.dumps(row) for row in run.rows[-1:]]), "eventsTail": "[]"},
            }
        return {"model": {"id": "P", "name": sent["project"], "entity": _ENTITY, "bucket": bucket}}

    def _on_CreateRunFiles(self, sent: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": file, "uploadUrl": f"{self.url}/put/{sent['run']}/{quote(file)}"} for file in sent["files"]]
        return {"createRunFiles": {"runID": _id(sent["run"]), "uploadHeaders": [], "files": files}}

    def _on_CreateArtifact(self, sent: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(sent["input"]["artifactCollectionName"])
        sequence = {"id": "S", "name": "s", "latestArtifact": None}
        artifact = {"id": f"artifact-{len(self.artifacts)}", "state": "COMMITTED", "currentManifest": None}
        return {"createArtifact": {"artifact": {**artifact, "artifactSequence": sequence}}}

    def _on_View(self, sent: dict[str, Any]) -> dict[str, Any]:
        if self.projects is not None and sent["name"] not in self.projects:
            return {"project": None}
        found = [view for view in self.views.values() if view["name"] == sent["viewName"]]
        return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}

    def _on_UpsertView2(self, sent: dict[str, Any]) -> dict[str, Any]:
        view_id = sent.get("id") or f"view-{len(self.views)}"
        self.views[view_id] = {"id": view_id, **{key: sent[key] for key in ("name", "displayName", "spec")}}
        return {"upsertView": {"view": {"id": view_id, "name": sent["name"]}, "inserted": not sent.get("id")}}

    def _on_UpsertSweep(self, sent: dict[str, Any]) -> dict[str, Any]:
        self.sweeps.append(sent)
        project = {"id": "P", "name": sent["projectName"], "entity": _ENTITY}
        return {"upsertSweep": {"sweep": {"name": "sweep0", "project": project}, "configValidationWarnings": []}}

    def _on_CreateAgent(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": "agent0"}}}

    def _on_Heartbeat(self, _: dict[str, Any]) -> dict[str, Any]:
        commands = [self.jobs.pop(0)] if self.jobs else []
        return {"agentHeartbeat": {"agent": {"id": "agent0"}, "commands": json.dumps(commands)}}


@contextmanager
def wandb_server(patch: pytest.MonkeyPatch, folder: Any) -> Iterator[WandbServer]:
    """A running server that wandb in this process, and in processes that it starts, takes for W&B."""
    try:
        server = WandbServer()
    except OSError as error:
        pytest.skip(f"no server can be started on 127.0.0.1: {error}")
    wandb.teardown()  # its service process keeps the settings of whoever started it
    settings = {
        **{"BASE_URL": server.url, "API_KEY": "0" * 40, "MODE": "online", "ENTITY": ENTITY},
        **{f"{name}_DIR": str(folder) for name in ("CONFIG", "CACHE", "DATA")},
    }
    for name, value in settings.items():
        patch.setenv(f"WANDB_{name}", value)
    server.start()
    try:
        yield server
    finally:
        wandb.finish()  # a test that failed has left its run open
        wandb.teardown()
        server.stop()


class _Http(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Say nothing: clients that are done hang up."""


class _Handler(BaseHTTPRequestHandler):
    server_of_wandb: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._send({}, 404)

    def do_PUT(self) -> None:
        self.server_of_wandb.upload(self.path, self._body())
        self._send({})

    def do_POST(self) -> None:
        body = json.loads(self._body() or b"{}")
        if self.path == "/graphql":
            self._send(self.server_of_wandb.answer(body["query"], body.get("variables") or {}))
        elif self.path.endswith("/file_stream"):
            self.server_of_wandb.stream(self.path, body)
            self._send({"limits": {}})
        else:
            self._send({}, 404)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("transfer-encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
        return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

    def _send(self, answer: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _id(name: str) -> str:
    return base64.b64encode(f"Run:{name}".encode()).decode()
