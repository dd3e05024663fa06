"""What the server keeps for the page: bounded in bytes, and found again by a token."""

import secrets
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

import gradio as gr

Item = TypeVar("Item")


class Store(Generic[Item]):
    """The items used last, at most `limit` bytes of them, each under a token that nobody can guess.

    Args:
        limit: bytes.
        size_of: bytes of an item; they do not change.
        too_large: what is said of an item larger than the limit.
    """

    def __init__(self, limit: int, size_of: Callable[[Item], int], too_large: str):
        self.limit = limit
        self._size_of = size_of
        self._too_large = too_large
        self._items: OrderedDict[str, Item] = OrderedDict()
        self._lock = Lock()

    def put(self, item: Item) -> str:
        """Keeps an item, forgets the longest unused ones as needed, and returns the item's token.

        Raises:
            gr.Error: the item alone is larger than the limit.
        """
        if self._size_of(item) > self.limit:
            raise gr.Error(self._too_large, print_exception=False)
        token = secrets.token_urlsafe(24)
        with self._lock:
            self._items[token] = item
            while self.size() > self.limit:
                self._items.popitem(last=False)
        return token

    def get(self, token: str) -> Item:
        """The item of a token.

        Raises:
            KeyError: it was forgotten, or never was.
        """
        with self._lock:
            self._items.move_to_end(token)
            return self._items[token]

    def size(self) -> int:
        """Bytes held."""
        return sum(map(self._size_of, self._items.values()))
