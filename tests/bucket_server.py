"""Google Cloud Storage on this machine, for tests: python bucket_server.py PORT

An emulator serves the bucket ``bucket`` from memory. What it leaves out and Orbax relies on is
added here: generations of objects and conditions on them, the bounds of a listing, and moves.
"""

import json
import sys
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

MOVE = r"^/storage/v1/b/(?P<bucket_name>[^/]+)/o/(?P<object_id>.+)/moveTo/o/(?P<dest_object_id>.+)$"


def main(port):
    for _, methods in server.HANDLERS:
        for method, handler in methods.items():
            if handler in (objects.get, objects.download, objects.insert, objects.delete):
                methods[method] = conditional(handler)
            if handler is objects.ls:
                methods[method] = bounded(handler)
    server.HANDLERS = ((MOVE, {"POST": move}), *server.HANDLERS)
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket").run()


def conditional(handler):
    def handle(request, response, storage):
        query = {name: values[0] for name, values in request.query.items()}
        name = request.params.get("object_id") or query.get("name")
        if name is None:
            return handler(request, response, storage)
        try:
            stored = storage.get_file_obj(request.params["bucket_name"], name)
            generation, changes = stored["generation"], stored["metageneration"]
        except NotFound:
            generation, changes = "0", "0"
        if query.get("ifGenerationMatch", generation) != generation:
            request.data  # noqa: B018  (reads what was sent, so that the answer is)
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif generation != "0" and query.get("ifGenerationNotMatch") == generation:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            handler(request, response, storage)
            if request.method == "GET":
                response["x-goog-generation"] = generation
                response["x-goog-metageneration"] = changes

    return handle


def bounded(handler):
    def handle(request, response, storage):
        handler(request, response, storage)
        start = request.query.get("startOffset", [""])[0]
        end = request.query.get("endOffset", ["\U0010ffff"])[0]
        if response.status == HTTPStatus.OK:
            found = json.loads(response._content)
            found["items"] = [item for item in found["items"] if start <= item["name"] < end]
            response.json(found)

    return handle


def move(request, response, storage):
    request.params["dest_bucket_name"] = request.params["bucket_name"]
    objects.copy(request, response, storage)
    if response.status == HTTPStatus.OK:
        storage.delete_file(request.params["bucket_name"], request.params["object_id"])


if __name__ == "__main__":
    main(int(sys.argv[1]))
