"""Ray Serve's usual example, a transformers pipeline with `@serve.batch`: `python peer_ray_serve.py MODEL PORT`.

Runs in an environment of its own, see peers.py.
"""

import os
import signal
import sys
import threading

import ray
from ray import serve
from transformers import pipeline


@serve.deployment(max_ongoing_requests=200, ray_actor_options={"num_cpus": os.cpu_count()})
class Classifier:
    def __init__(self, model):
        self.pipe = pipeline("text-classification", model=model, device=-1, top_k=None, batch_size=32)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
    async def classify(self, requests):
        """A list of texts for each of up to 32 requests."""
        texts = [text for given in requests for text in given]
        answers = iter(self.pipe(texts))
        return [[next(answers) for _ in given] for given in requests]

    async def __call__(self, request):
        return await self.classify((await request.json())["input"])


if __name__ == "__main__":
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ray.init(address="local", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    serve.run(Classifier.bind(sys.argv[1]))
    ended.wait()
    ray.shutdown()
