"""Where fallow meets other libraries; nothing here is imported before it is asked for."""

from fallow.integrations.torchvision import mend_torchvision, need_timm, need_transformers

__all__ = ["mend_torchvision", "need_timm", "need_transformers"]
