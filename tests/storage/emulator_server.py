"""`python emulator_server.py BUCKET`: the storage emulator until standard input is closed.

It listens at a port that the system chooses, and says which on its standard output.

To what gcp-storage-emulator does it adds generations, which TensorStore and locks live by: the
header that names an object's, and the conditions on it of reads, writes and deletions. One request
is served at a time, so that a condition holds until what it guards is done. And of a request that
was cut off it keeps nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound

_turn = threading.RLock()


def _name(request: Any) -> str | None:
    if "object_id" in (request.params or {}):
        return request.params["object_id"]
    if "name" in request.query:
        return request.query["name"][0]
    body = request.data
    return body.get("meta", {}).get("name") if isinstance(body, dict) else None


def _generation(storage: Any, bucket: str, name: str) -> str:
    try:
        return str(storage.get_file_obj(bucket, name)["generation"])
    except NotFound:
        return "0"


def _with_generations(handler: Callable[..., None]) -> Callable[..., None]:
    def handle(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> None:
        _ = request.data  # before the turn: a body may be long in coming
        with _turn:
            bucket = (request.params or {}).get("bucket_name")
            wanted = request.query.get("ifGenerationMatch", [None])[0]
            unwanted = request.query.get("ifGenerationNotMatch", [None])[0]
            media = request.method == "GET" and request.query.get("alt") == ["media"]
            if bucket and (wanted or unwanted or media) and (name := _name(request)):
                now = _generation(storage, bucket, name)
                if wanted is not None and wanted != now:
                    response.status = HTTPStatus.PRECONDITION_FAILED
                    return
                if unwanted is not None and unwanted == now:
                    response.status = (HTTPStatus.NOT_MODIFIED if now != "0"
                                       else HTTPStatus.NOT_FOUND)
                    return
                if media and now != "0":
                    response["x-goog-generation"] = now
            handler(request, response, storage, *args, **kwargs)

    return handle


def _whole_body(read: Callable[[Any], bytes | None]) -> Callable[[Any], bytes | None]:
    def checked(handler: Any) -> bytes | None:
        body = read(handler)
        if len(body or b"") < int(handler.headers.get("Content-Length") or 0):
            raise ConnectionError("half a body: Google's storage would keep nothing of it")
        return body

    return checked


def main() -> None:
    """Serves until standard input is closed, which the end of the parent does too."""
    emulator._read_raw_data = _whole_body(emulator._read_raw_data)
    for _, handlers in emulator.HANDLERS:
        for method, handler in handlers.items():
            handlers[method] = _with_generations(handler)
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket=sys.argv[1])
    server.start()
    print(server._api._httpd.server_address[1], flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
