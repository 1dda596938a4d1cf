"""Pages as they are: what they load and say, and how they behave in a real browser."""

import asyncio
import json
import subprocess
import time
from html.parser import HTMLParser

import aiohttp


class Loads(HTMLParser):
    """What a page loads, and the text that it shows."""

    def __init__(self, html: str):
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.shown: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.loads += [given[name] for name in ("src", "srcset", "poster") if name in given]
        if tag == "link":
            self.loads.append(given["href"])
        elif "href" in given:
            self.links.append(given["href"])

    def handle_data(self, data):
        self.shown.append(data)


class Browser:
    """A page in headless Chromium, driven over its DevTools protocol."""

    def __init__(self, binary, profile, *more_flags):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
        flags += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"]
        self.process = subprocess.Popen(
            [binary, *flags, *more_flags, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.loop = asyncio.new_event_loop()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.number = 0
        try:
            port = self._port(profile / "DevToolsActivePort")
            self.loop.run_until_complete(self._connect(port))
        except BaseException:
            self.close()
            raise

    def _port(self, file) -> int:
        for _ in range(600):
            if file.exists() and "\n" in (text := file.read_text()):
                return int(text.splitlines()[0])
            assert self.process.poll() is None, "chromium ended at once"
            time.sleep(0.1)
        raise AssertionError("chromium did not start within a minute")

    async def _connect(self, port):
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            (target,) = [t for t in await answer.json() if t["type"] == "page"]
        self.socket = await self.session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Network", "Runtime"):
            await self._send(f"{domain}.enable", {})

    async def _send(self, method, parameters):
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json(timeout=60)
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"]["text"])
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def send(self, method, **parameters):
        return self.loop.run_until_complete(self._send(method, parameters))

    def run(self, script):
        return self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)["result"].get(
            "value"
        )

    def open(self, place, width):
        """Shows a file, or what is at an address."""
        url = place if isinstance(place, str) else place.as_uri()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.send("Page.navigate", url=url)
        for _ in range(300):
            if self.run(f"location.href.startsWith({json.dumps(url)}) && document.readyState == 'complete'"):
                return
            time.sleep(0.1)
        raise AssertionError("the page did not load within 30 s")

    def open_and_check(self, page, width):
        """Shows a file that is no wider than the window, has all its pictures, loads nothing else and runs cleanly."""
        self.requests.clear()
        self.errors.clear()
        self.open(page, width)
        assert self.run("document.documentElement.scrollWidth") <= width
        assert self.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert [url for url in self.requests if not url.startswith(("data:", "file:"))] == []
        assert self.errors == []

    def mouse(self, kind, x, y):
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def key(self, name):
        code = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[name]
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def close(self):
        if hasattr(self, "session"):
            self.loop.run_until_complete(self.session.close())
        self.loop.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
