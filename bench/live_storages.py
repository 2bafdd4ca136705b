from coat_train.memory import LiveStorages

__all__ = ["LiveStorages"]
