"""Other implementations, measured on the same inputs. Each is loaded by its public import name, only where it is asked for."""

from perf.peers.base import Peer
from perf.peers.fa3 import Fa3
from perf.peers.flashinfer import FlashInfer
from perf.peers.flashmla import FlashMla
from perf.peers.numpy_way import NumpyWay
from perf.peers.sdpa import Sdpa
from perf.peers.triton import TritonMla

PEERS: dict[str, Peer] = {peer.name: peer for peer in (FlashMla(), Fa3(), TritonMla(), FlashInfer(), Sdpa(), NumpyWay())}
GPU_PEERS = tuple(name for name, peer in PEERS.items() if peer.library == "torch")
CPU_PEERS = tuple(name for name, peer in PEERS.items() if peer.library == "numpy")

__all__ = ["CPU_PEERS", "GPU_PEERS", "PEERS", "Peer"]
