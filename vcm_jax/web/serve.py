"""The server: what it answers, to whom, and how it starts and ends."""

import os
import re

from vcm_jax.web.files import Files
from vcm_jax.web.page import Page

# What gradio answers besides, and the page has no use for: fetching other servers' files, editing
# of the program, recordings, and statistics.
_REFUSED = re.compile(
    r"(/gradio_api)?/(proxy=|file=https?:|file/|vibe-edit|undo-vibe-edit|process_recording"
    r"|run-history|runs|deep_link|monitoring|dev/|custom_component)"
)
# The browser loads nothing from elsewhere, whatever gradio's scripts say.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' blob: data:; worker-src 'self' blob:; "
    "frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """Refuses what the page does not need, and adds headers to every answer (ASGI)."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if _REFUSED.match(scope["path"]):
            await send({"type": "http.response.start", "status": 404, "headers": []})
            return await send({"type": "http.response.body", "body": b"not here"})

        async def sending(message):
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                names = {name for name, _ in extra}
                kept = [pair for pair in message["headers"] if pair[0].lower() not in names]
                message["headers"] = kept + extra
            await send(message)

        return await self.app(scope, receive, sending)


def prepare(files: Files) -> None:
    """Settings that gradio reads from the environment; before its first component is made."""
    os.environ["GRADIO_TEMP_DIR"] = str(files.root)
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(files.root / "examples")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for name in ("GRADIO_ALLOWED_PATHS", "GRADIO_SHARE", "GRADIO_ROOT_PATH"):
        os.environ.pop(name, None)


def start(page: Page, host: str, port: int | None, auth: tuple[str, str] | None):
    """Starts the server in threads of its own.

    Args:
      page: what it shows.
      host: address to listen at.
      port: None for the first free one from 7860 on.
      auth: (name, password) that visitors must give; None: nobody is asked.

    Returns:
      (gradio's blocks, whose `close` ends the server, and the address of the page).

    Raises:
      OSError: the port is not free.
    """
    from vcm_jax.web.look import CSS, theme

    blocks = page.build()
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        max_file_size=int(page.limits.megabytes * 1e6),
        theme=theme(),
        css=CSS,
        app_kwargs={"middleware": [(Guard, (), {})]},
        footer_links=["api"],
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        num_workers=0,
        show_error=True,
    )
    return blocks, address
