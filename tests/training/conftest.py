"""A bucket on this machine."""

import json
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

SERVER = Path(__file__).with_name("bucket_server.py")


class Bucket:
    """A bucket, called ``bucket``: its files, seen past the runs."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"
        # For Google's libraries to take it for theirs.
        self.env = {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            # Another service, which tells the kind of a bucket, is not there.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def names(self, prefix):
        query = urllib.parse.urlencode({"prefix": prefix})
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/bucket/o?{query}") as answer:
            return [item["name"] for item in json.load(answer)["items"]]

    def steps(self, run):
        """Steps with a file, and those of them that are complete."""
        parts = [name.split("/") for name in self.names(run + "/")]
        begun = {int(part[1]) for part in parts if part[1].isdigit()}
        return begun, {s for s in begun if [run, str(s), "commit_success.txt"] in parts}

    def read(self, name):
        return urllib.request.urlopen(f"{self.url}/bucket/{urllib.parse.quote(name)}").read()

    def write(self, name, content):
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        url = f"{self.url}/upload/storage/v1/b/bucket/o?{query}"
        urllib.request.urlopen(urllib.request.Request(url, data=content)).close()

    def remove(self, prefix):
        for name in self.names(prefix):
            url = f"{self.url}/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe='')}"
            urllib.request.urlopen(urllib.request.Request(url, method="DELETE")).close()

    def copy_to(self, run, folder):
        for name in self.names(run + "/"):
            target = folder / name.removeprefix(run + "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.read(name))


@pytest.fixture(scope="module")
def bucket():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    bucket = Bucket(port)
    for _ in range(600):
        assert process.poll() is None
        try:
            bucket.names("")
            break
        except OSError:
            time.sleep(0.1)
    else:
        pytest.fail("the bucket's server does not answer")
    yield bucket
    process.kill()
    process.communicate()
