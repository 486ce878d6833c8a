"""A picture from the page's functions for programs; then half of its tokens are painted again.

pip install gradio_client
python docs/examples/page_client.py http://127.0.0.1:7860 "red heart"

It writes before.png and after.png into the folder where it runs.
"""

import base64
import sys
from pathlib import Path

from gradio_client import Client


def save(path, url):
    """Writes the picture of a data URL."""
    Path(path).write_bytes(base64.b64decode(url.split(",", 1)[1]))


def main(address, prompt):
    client = Client(address, verbose=False)
    job = client.submit(prompt=prompt, seed=1, api_name="/generate")
    for preview in job:
        print(f"step {preview['step']} of {preview['num_steps']}")
    made = job.result()
    save("before.png", made["pictures"][0])

    codes = made["codes"][0]
    half = len(codes) // 2
    # The number of codes stands for a token that is to be found.
    known = codes[:half] + [made["num_codes"]] * half
    again = client.predict(prompt=prompt, seed=2, known=known, api_name="/generate")
    save("after.png", again["pictures"][0])
    assert again["codes"][0][:half] == codes[:half]


if __name__ == "__main__":
    main(*sys.argv[1:3])
