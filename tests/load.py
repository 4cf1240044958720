"""Requests without pause, while something is done to what answers them."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import requests

from tests.waiting import until


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


class Follower:
    """A client that calls a Service's ready endpoints (HOST:PORT) in turn, as a kube-proxy has it done.

    `list_ready` asks for them; `name` says who gave an answer, of which it keeps the count.
    """

    def __init__(
        self, list_ready: Callable[[], list[str]], path: str, name: Callable[[requests.Response], str]
    ) -> None:
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self.ready: list[str] = []
        self._list_ready, self._path, self._name = list_ready, path, name
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._follow, self._call, self._call)]

    def __enter__(self) -> "Follower":
        self._threads[0].start()
        until(lambda: self.ready, "a ready endpoint")
        for thread in self._threads[1:]:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _follow(self) -> None:
        while not self._stop.is_set():
            self.ready = self._list_ready()
            self._stop.wait(0.05)

    def _call(self) -> None:
        turn = 0
        while not self._stop.is_set():
            ready = self.ready
            turn += 1
            target = ready[turn % len(ready)] if ready else ""
            try:
                # A connection of its own for each: so that none is refused unseen.
                url, headers = f"http://{target}{self._path}", {"connection": "close"}
                answer = requests.get(url, timeout=10, headers=headers)
                answer.raise_for_status()
                self.answers[self._name(answer)] += 1
            except requests.RequestException as error:
                self.failures.append(f"{target}: {error}")
