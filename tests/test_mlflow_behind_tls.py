"""The MLflow server of infra/mlflow.compose.yaml behind a proxy with TLS and a login, for clients and for browsers."""

import asyncio
import base64
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import aiohttp
import mlflow
import pytest
import yaml
from aiohttp import web
from browser import Browser
from ray_head import free_ports

pytestmark = pytest.mark.soak
ROOT = Path(__file__).parent.parent
HOST = "mlflow.example.com"
# What a proxy does not pass on: it belongs to one connection.
HOP = {"connection", "keep-alive", "transfer-encoding", "content-encoding", "content-length", "te", "upgrade"}
LOGINS = {f"Basic {base64.b64encode(b'ann:secret').decode()}", "Bearer a-token"}


class Proxy:
    """Ends TLS, asks for a login, and passes everything else on with the Host that the client named."""

    def __init__(self, port: int, server: str, certificate: Path, key: Path):
        self.port, self.server = port, server
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(certificate, key)
        self.loop = asyncio.new_event_loop()
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()
        assert self.ready.wait(10)

    def _serve(self) -> None:
        async def start() -> web.AppRunner:
            app = web.Application(client_max_size=1 << 30)
            app.router.add_route("*", "/{path:.*}", self._pass_on)
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", self.port, ssl_context=self.context).start()
            return runner

        runner = self.loop.run_until_complete(start())
        self.ready.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())
        self.loop.close()

    async def _pass_on(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") not in LOGINS:
            return web.Response(status=401, headers={"WWW-Authenticate": "Basic"})
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP}
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                request.method, self.server + request.raw_path, headers=headers, data=await request.read(),
                allow_redirects=False,
            ) as answer,
        ):  # fmt: skip
            passed = {name: value for name, value in answer.headers.items() if name.lower() not in HOP}
            return web.Response(status=answer.status, headers=passed, body=await answer.read())

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """A certificate that no authority signed, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on the PATH, which makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={HOST}",
         "-addext", f"subjectAltName=DNS:{HOST},DNS:localhost", "-keyout", folder / "key.pem",
         "-out", folder / "certificate.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder / "certificate.pem", folder / "key.pem"


@pytest.fixture(scope="module")
def proxy(certificate, tmp_path_factory) -> Iterator[Proxy]:
    """The server with the options of the compose file, filled in as infra/mlflow.env.example says; its own places."""
    folder = tmp_path_factory.mktemp("mlflow")
    port, tls_port = free_ports(2)
    example = (ROOT / "infra" / "mlflow.env.example").read_text().replace("YOUR-MLFLOW-HOST", HOST)
    values = dict(re.findall(r"^(\w+)=(.+)$", example, re.MULTILINE))
    values["MLFLOW_ALLOWED_HOSTS"] += f",localhost:{tls_port}"  # the clients of this test, which have no name server
    compose = yaml.safe_load((ROOT / "infra" / "mlflow.compose.yaml").read_text())
    words = [re.sub(r"\$\{(\w+)[^}]*\}", lambda match: values[match[1]], word)
             for word in compose["services"]["mlflow"]["command"]]  # fmt: skip
    own = {
        "--host": "127.0.0.1", "--port": str(port), "--workers": "1",
        "--backend-store-uri": f"sqlite:///{folder}/mlflow.db", "--artifacts-destination": f"{folder}/artifacts",
    }  # fmt: skip
    words = [f"{name}={own.get(name, value)}" if value else name
             for name, _, value in (word.partition("=") for word in words)]  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", *words], stdout=log, stderr=log, cwd=folder)
    proxy = Proxy(tls_port, f"http://127.0.0.1:{port}", *certificate)
    try:
        for _ in range(240):
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.5)
        yield proxy
    finally:
        proxy.stop()
        server.terminate()
        server.wait(30)


def examined(proxy: Proxy, out: Path, **environment: str) -> tuple[bool, str]:
    """What `deedsr doctor`, which writes a run, says of the MLflow server."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    said = subprocess.run(
        [sys.executable, "-m", "deedsr", "doctor", "--out", out, "--json"], capture_output=True, text=True, cwd=ROOT,
        env=found | {"MLFLOW_TRACKING_URI": f"https://localhost:{proxy.port}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
        | environment,
    )  # fmt: skip
    [check] = [check for check in json.loads(said.stdout)["checks"] if check["name"] == "MLflow"]
    return check["ok"], f"{check}"


def test_clients_pass_the_login_of_the_proxy_and_its_own_certificate(proxy, certificate, tmp_path):
    trusted = {"MLFLOW_TRACKING_SERVER_CERT_PATH": str(certificate[0])}
    login = {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": "secret"}
    for shown in (login, {"MLFLOW_TRACKING_TOKEN": "a-token"}):
        ok, said = examined(proxy, tmp_path, **trusted, **shown)
        assert ok, said
    ok, said = examined(proxy, tmp_path, **trusted)
    assert not ok
    assert "401" in said
    ok, said = examined(proxy, tmp_path, **login)
    assert not ok
    assert "certificate verify failed" in said


def test_pages_show_runs_in_a_browser_that_reaches_the_server_through_the_proxy(
    proxy, certificate, chromium, tmp_path, monkeypatch
):
    for name, value in {"MLFLOW_TRACKING_TOKEN": "a-token", "MLFLOW_TRACKING_SERVER_CERT_PATH": certificate[0]}.items():
        monkeypatch.setenv(name, str(value))
    client = mlflow.MlflowClient(f"https://localhost:{proxy.port}")
    kind = {"mlflow.experimentKind": "custom_model_development"}  # else the pages show traces instead of runs
    experiment = client.create_experiment("seen-in-a-browser", tags=kind)
    client.create_run(experiment, run_name="a-run-behind-tls")
    browser = Browser(
        chromium, tmp_path / "profile", "--ignore-certificate-errors", "--no-proxy-server",
        f"--host-resolver-rules=MAP {HOST}:443 127.0.0.1:{proxy.port}",
    )  # fmt: skip
    try:
        browser.send("Network.setExtraHTTPHeaders", headers={"Authorization": "Bearer a-token"})
        browser.open(f"https://{HOST}/", 1400)
        browser.run(f"location.hash = '#/experiments/{experiment}/runs'")
        # The table of runs comes by a POST, which MLflow refuses from an origin that it does not know.
        for _ in range(120):
            if "a-run-behind-tls" in (text := browser.run("document.body.innerText") or ""):
                break
            time.sleep(0.5)
        assert "a-run-behind-tls" in text
    finally:
        browser.close()
