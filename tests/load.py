"""Requests without pause, while something is done to what answers them."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import requests


class Load:
    """What clients that ask without pause were answered."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self.stop = threading.Event()

    def run(self, url: str, keep_alive: bool) -> None:
        """Asks until it is stopped, in one connection or a new one each time."""
        session = requests.Session()
        while not self.stop.is_set():
            try:
                answer = (session if keep_alive else requests).get(url, timeout=10)
            except requests.RequestException as error:
                self.failures.append(str(error))
                continue
            if answer.ok:
                self.answers[answer.text] += 1
            else:
                self.failures.append(f"{answer.status_code} {answer.text}")


@contextmanager
def load(url: str, clients: int = 4) -> Iterator[Load]:
    """Requests from several clients, some of which keep their connections."""
    made = Load()
    threads = [threading.Thread(target=made.run, args=(url, index % 2 == 0)) for index in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield made
    finally:
        made.stop.set()
        for thread in threads:
            thread.join()
