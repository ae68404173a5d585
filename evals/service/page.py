"""The page's own files, read once when the service starts: what a client asks for is a key, never a path."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException, Response

__all__ = ["WEB", "page_router"]

WEB = Path(__file__).resolve().parents[1] / "web"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/vnd.microsoft.icon",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
INDEX = "index.html"


def read_files(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Name -> contents and content type of the folder's regular files of known suffixes; links are none."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return {
        path.name: (path.read_bytes(), TYPES[path.suffix])
        for path in found
        if path.suffix in TYPES and path.is_file() and not path.is_symlink()
    }


def page_router(folder: Path = WEB) -> APIRouter:
    """GET / and GET /assets/{name}; they hold no data, so they answer without a token."""
    files = read_files(folder)
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    def index() -> Response:
        return _answer(INDEX)

    @router.get("/assets/{name}")
    def asset(name: str) -> Response:
        return _answer(name)

    def _answer(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "the page has no such file")
        content, kind = files[name]
        return Response(content, media_type=kind)

    return router
