"""A real Chromium over its debugging protocol: opens a page, does what a person would, and keeps what the page complains of."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import pytest

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
_RGB = "getComputedStyle(document.body).{}.match(/[0-9.]+/g)"


class Page:
    """An open page. problems: exceptions, console errors and requests that left the file."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.last, self.problems, self.events = socket, 0, [], []  # type: ignore[var-annotated]

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.last += 1
        number = self.last
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await asyncio.wait_for(self.socket.receive_json(), 60)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    async def run(self, script: str) -> Any:
        """The value of a script in the page."""
        found = await self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def show(self, width: int, scheme: str) -> None:
        """On a window of so many px; scheme: `light` or `dark`."""
        await self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        await self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def wait(self, event: str) -> None:
        while not any(each["method"] == event for each in self.events):
            self._note(await asyncio.wait_for(self.socket.receive_json(), 60))

    def _note(self, message: dict[str, Any]) -> None:
        if "method" not in message:
            return
        self.events.append(message)
        what, params = message["method"], message["params"]
        if what == "Runtime.exceptionThrown" or (what == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning")):
            self.problems.append(params)
        if what == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"])
        if what == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("data:", "blob:", "file:")):
            self.problems.append(params["request"]["url"])


def visit(
    page: Path, profile: Path, act: Callable[[Page], Coroutine[Any, Any, Any]], width: int = 1200, height: int = 2000
) -> Any:
    """What `act` returns on the open page; downloads lie in `profile`/downloads. Fails on anything that the page complains of."""
    profile.mkdir(parents=True, exist_ok=True)
    command = ["chromium", *_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", "--remote-debugging-port=0"]
    browser = subprocess.Popen([*command, "about:blank"], stderr=subprocess.PIPE, text=True)
    try:
        assert browser.stderr is not None
        address = next(line.split()[-1] for line in browser.stderr if line.startswith("DevTools listening on "))
        return asyncio.run(_visit(address, page, profile / "downloads", act))
    finally:
        browser.kill()
        browser.communicate()


async def _visit(address: str, page: Path, downloads: Path, act: Callable[[Page], Coroutine[Any, Any, Any]]) -> Any:
    port = address.split(":")[2].split("/")[0]
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            targets = json.loads(await answer.text())
        target = next(each for each in targets if each["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            opened = Page(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await opened.send(f"{domain}.enable")
            await opened.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads), eventsEnabled=True)
            await opened.send("Page.navigate", url=page.as_uri())
            await opened.wait("Page.loadEventFired")
            found = await act(opened)
            assert not opened.problems, opened.problems
            return found


def in_the_dark(page: Path, profile: Path, width: int = 400) -> tuple[int, float, float]:
    """A page on a narrow window in dark mode: by how many px it is wider than the window outside of what scrolls by itself, and
    how bright paper and ink are, 0 to 1."""

    async def act(opened: Page) -> tuple[int, float, float]:
        await opened.show(width, "dark")
        wider = await opened.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        paper, ink = [
            await opened.run(f"{_RGB.format(name)}.slice(0, 3).reduce((sum, each) => sum + each / 765, 0)")
            for name in ("backgroundColor", "color")
        ]
        return wider, paper, ink

    return visit(page, profile, act)
