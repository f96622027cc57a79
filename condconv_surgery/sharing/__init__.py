"""Share a converted model: a folder for the Hugging Face Hub, with a model card."""

from condconv_surgery.sharing.hub_folder import from_pretrained, push_to_hub, save_pretrained, upload

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained", "upload"]
