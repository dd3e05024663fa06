"""What the server keeps: the items used last, within a limit of bytes."""

import secrets
from collections.abc import Callable, Hashable
from contextlib import suppress
from threading import Lock
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

from cachetools import LRUCache

from app.runtime.validation import refused

Item = TypeVar("Item")


class Store(Generic[Item]):
    """The items used last, at most `limit` bytes of them. It may be used by many threads at once.

    Args:
        limit: bytes.
        size_of: bytes of an item; they do not change.
        too_large: what a visitor is told of an item larger than the limit.
    """

    def __init__(self, limit: int, size_of: Callable[[Item], int], too_large: str = "This is too large to be kept."):
        self.limit = limit
        self._items: LRUCache[Hashable, Item] = LRUCache(limit, size_of)
        self._too_large = too_large
        self._lock = Lock()
        self._making: WeakValueDictionary[Hashable, Lock] = WeakValueDictionary()

    def put(self, item: Item, prefix: str = "") -> str:
        """Keeps an item, forgets the longest unused ones as needed, and returns a token that nobody can guess.

        Args:
            item: what to keep.
            prefix: how the token begins.

        Raises:
            gr.Error: the item alone is larger than the limit.
        """
        token = prefix + secrets.token_urlsafe(24)
        try:
            with self._lock:
                self._items[token] = item
        except ValueError:
            raise refused(self._too_large) from None
        return token

    def get(self, key: Hashable) -> Item:
        """The item under a key.

        Raises:
            KeyError: it was forgotten, or never was.
        """
        with self._lock:
            return self._items[key]

    def get_or_make(self, key: Hashable, make: Callable[[], Item]) -> Item:
        """The item under a key, made if it is not there: once, however many ask for it at the same time.

        An item larger than the limit is returned and not kept.
        """
        with self._lock:
            making = self._making.setdefault(key, Lock())
        with making:
            with suppress(KeyError):
                return self.get(key)
            item = make()
            with self._lock, suppress(ValueError):
                self._items[key] = item
        return item

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._items

    def size(self) -> int:
        """Bytes held."""
        return self._items.currsize
