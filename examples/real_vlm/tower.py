"""An EfficientNet-Lite0 with ImageNet weights as the vision tower of a LLaVA (`model.code: tower.py`).

The last feature map is pooled to 4 x 4, so an image becomes 16 tokens. The network is timm's; `build.py` fills its
weights. Importing this file registers the tower with transformers' Auto classes.
"""

from __future__ import annotations

from typing import Any

import timm
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

SIDE = 4


class TowerConfig(PretrainedConfig):
    """Name of timm's network, size of the images and of the features."""

    model_type = "timm_patches"

    def __init__(
        self,
        network: str = "tf_efficientnet_lite0",
        image_size: int = 224,
        hidden_size: int = 1280,
        **more: Any,
    ) -> None:
        self.network, self.image_size, self.hidden_size = network, image_size, hidden_size
        self.patch_size = image_size // SIDE
        super().__init__(**more)


class Tower(PreTrainedModel):
    """[images, 3, size, size] -> [images, 16, hidden_size]."""

    config_class = TowerConfig
    main_input_name = "pixel_values"
    _no_split_modules: list[str] = []  # noqa: RUF012  (transformers' own way)

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        self.network = timm.create_model(config.network, pretrained=False, num_classes=0)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the weights come from a checkpoint."""

    def train(self, mode: bool = True) -> Tower:
        """The network stays in evaluation mode: it is frozen, so its batch statistics must not move."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """Features of each part of the images, row by row."""
        found = nn.functional.adaptive_avg_pool2d(self.network.forward_features(pixel_values), SIDE)
        patches = found.flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=patches, hidden_states=(patches,))


AutoConfig.register(TowerConfig.model_type, TowerConfig)
AutoModel.register(TowerConfig, Tower)
