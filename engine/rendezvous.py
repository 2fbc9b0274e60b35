"""A store of its own for every attempt of a job: what ranks meet in, and leave notices in.

torchrun's agent lends its workers the store in which the agents met. A restarted group finds there
what the one before it left behind, addresses of dead processes among them, and fails to connect (of
six restarts after a killed worker, one succeeded). The ranks of an attempt therefore agree on a
prefix that nobody has used before.
"""

import os
import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

_POLL_S = 0.01


def fresh_store(rank: int, world_size: int, timeout: timedelta) -> PrefixStore:
    """The store of this attempt, from the address that torchrun gave (MASTER_ADDR, MASTER_PORT).

    Args:
        rank: of this process.
        world_size: number of ranks; all of them call this.
        timeout: for the others to come.

    Raises:
        RuntimeError: ranks that did not come, by number.
    """
    store = PrefixStore("mentorch", _connect(rank == 0, timeout))
    token = _lead(store, world_size, timeout) if rank == 0 else _follow(store, rank)
    return PrefixStore(token, store)


def second_connection(store: PrefixStore) -> Store:
    """The same store over another connection: a request that blocks does not block the other."""
    again = TCPStore(_host(), _port(), is_master=False, wait_for_workers=False)
    token = store.get("token").decode()
    return PrefixStore(f"notices/{token}", PrefixStore("mentorch", again))


def _host() -> str:
    return os.environ["MASTER_ADDR"]


def _port() -> int:
    return int(os.environ["MASTER_PORT"])


def _connect(is_main: bool, timeout: timedelta) -> TCPStore:
    # The agent serves this address already; without one (srun, mpirun), rank 0 does.
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        _host(),
        _port(),
        is_master=is_main and not agent_serves,
        timeout=timeout,
        wait_for_workers=False,
    )


def _follow(store: Store, rank: int) -> str:
    """Asks rank 0 for the token under a number that no earlier attempt can have answered."""
    nonce = uuid.uuid4().hex
    store.set(f"asks/{rank}", nonce)
    token: str = store.get(f"answer/{nonce}").decode()
    store.set(f"{token}/has/{rank}", "")
    return token


def _lead(store: Store, world_size: int, timeout: timedelta) -> str:
    """Answers every rank until all have the token; questions of earlier attempts may be around."""
    token = uuid.uuid4().hex
    store.set(f"{token}/token", token)
    answered: dict[int, str] = {}
    waiting = set(range(1, world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"asks/{rank}"]):
                nonce = store.get(f"asks/{rank}").decode()
                if answered.get(rank) != nonce:
                    store.set(f"answer/{nonce}", token)
                    answered[rank] = nonce
            if rank in answered and store.check([f"{token}/has/{rank}"]):
                waiting.discard(rank)
        if waiting and time.monotonic() > deadline:
            late = ", ".join(map(str, sorted(waiting)))
            raise RuntimeError(f"of {world_size} ranks these did not come: {late}")
        time.sleep(_POLL_S if waiting else 0)
    return token
