from bench.live_storages import LiveStorages

__all__ = ["LiveStorages"]
