"""LitServe with a transformers pipeline, as its documentation shows: `python peer_litserve.py MODEL PORT`.

Runs in an environment of its own, see peers.py.
"""

import sys

import litserve
from transformers import pipeline


class Pipeline(litserve.LitAPI):
    def setup(self, device):
        self.pipe = pipeline("text-classification", model=sys.argv[1], device=-1, top_k=None, batch_size=32)

    def decode_request(self, request):
        return request["input"]

    def predict(self, requests):
        """A list of texts for each of up to 32 requests."""
        texts = [text for given in requests for text in given]
        answers = iter(self.pipe(texts))
        return [[next(answers) for _ in given] for given in requests]

    def encode_response(self, output):
        return {"output": output}


if __name__ == "__main__":
    server = litserve.LitServer(Pipeline(max_batch_size=32, batch_timeout=0.01), accelerator="cpu", timeout=60)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning")
