"""Small models of torchvision, timm and transformers, with random weights; nothing is downloaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Maker = Callable[[], tuple[Callable[[Tensor], Tensor], Tensor]]

WIDTH, HEADS, LAYERS, STEPS, WORDS = 32, 4, 2, 8, 50
CLASSES = 10


@dataclass(frozen=True)
class Model:
    """A model of a library: what makes it and the point, and whether positions see earlier ones only."""

    library: str
    name: str
    make: Maker
    causal: bool = False


def library(name: str) -> Any:
    """A library, once torchvision is there, which the other two look for."""
    _load_torchvision()
    return import_module(name)


def _load_torchvision() -> None:
    """Also where its compiled operators do not load: no model here runs any of them."""
    try:
        import_module("torchvision")
    except RuntimeError:
        _declare_operators()
        for name in [each for each in sys.modules if each.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import_module("torchvision")


def _declare_operators() -> None:
    for name in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{name}", schema)


def image(side: int, batch: int = 2) -> Tensor:
    """A few images, so that samples can be told apart."""
    return torch.randn(batch, 3, side, side)


def of_torchvision(name: str, side: int, module: str = "models", **options: Any) -> Model:
    def make() -> tuple[nn.Module, Tensor]:
        builder = getattr(library(f"torchvision.{module}"), name)
        return builder(**{"num_classes": CLASSES, **options}), image(side)

    return Model("torchvision", name, make)


def segmentation(name: str, side: int) -> Model:
    """A pixel-wise classifier: three classes for each pixel of one image."""

    def make() -> tuple[Callable[[Tensor], Tensor], Tensor]:
        builder = getattr(library("torchvision.models.segmentation"), name)
        net = builder(weights=None, weights_backbone=None, num_classes=3).eval().double()
        return lambda x: net(x)["out"], image(side, 1)

    return Model("torchvision", name, make)


VIT = {"patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
SWIN = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
NO_AUX = {"aux_logits": False, "init_weights": True}


def torchvision_models() -> list[Model]:
    return [
        of_torchvision("resnet18", 32),
        of_torchvision("resnext50_32x4d", 32),
        of_torchvision("alexnet", 64),
        of_torchvision("vgg11_bn", 32),
        of_torchvision("squeezenet1_1", 32),
        of_torchvision("densenet121", 32),
        of_torchvision("googlenet", 32, **NO_AUX),
        of_torchvision("inception_v3", 80, **NO_AUX),
        of_torchvision("mobilenet_v2", 32),
        of_torchvision("mobilenet_v3_small", 32),
        of_torchvision("mnasnet0_5", 32),
        of_torchvision("shufflenet_v2_x0_5", 32),
        of_torchvision("efficientnet_b0", 32),
        of_torchvision("regnet_y_400mf", 32),
        of_torchvision("convnext_tiny", 32),
        of_torchvision("VisionTransformer", 32, image_size=32, **VIT),
        of_torchvision("SwinTransformer", 32, window_size=[4, 4], **SWIN),
        segmentation("lraspp_mobilenet_v3_large", 32),
        segmentation("fcn_resnet50", 32),
    ]


def of_timm(name: str, side: int, **options: Any) -> Model:
    def make() -> tuple[nn.Module, Tensor]:
        create = library("timm").create_model
        return create(name, pretrained=False, num_classes=CLASSES, **options), image(side)

    return Model("timm", name, make)


def by_class(module: str, name: str, side: int, **options: Any) -> Model:
    """A model of timm by its class, smaller than any that it has a name for."""

    def make() -> tuple[nn.Module, Tensor]:
        library("timm")
        return getattr(import_module(module), name)(num_classes=CLASSES, **options), image(side)

    return Model("timm", name, make)


def timm_models() -> list[Model]:
    sized, mixing = {"img_size": 64}, {"patch_size": 8, "num_blocks": 2, "embed_dim": 32}
    return [
        of_timm("vit_tiny_patch16_224", 64, depth=2, **sized),
        of_timm("deit_tiny_patch16_224", 64, depth=2, **sized),
        of_timm("beit_base_patch16_224", 64, depth=2, embed_dim=96, num_heads=3, **sized),
        of_timm("eva02_tiny_patch14_224", 56, depth=2, img_size=56),
        of_timm("cait_xxs24_224", 64, depth=2, **sized),
        of_timm("xcit_nano_12_p16_224", 64, depth=2, **sized),
        by_class("timm.models.mlp_mixer", "MlpMixer", 32, img_size=32, **mixing),
        by_class("timm.models.convmixer", "ConvMixer", 32, dim=32, depth=4),
        of_timm("levit_128s", 64, img_size=64),
        of_timm("efficientformerv2_s0", 64, **sized),
        of_timm("poolformer_s12", 64),
        of_timm("pvt_v2_b0", 64),
        of_timm(
            "swinv2_tiny_window8_256", 64, depths=(2, 2), embed_dim=24, num_heads=(2, 4), **sized
        ),
        of_timm("mobilevit_xxs", 64),
        of_timm("edgenext_xx_small", 64),
        of_timm("convnext_atto", 64),
        of_timm("ghostnet_050", 64),
        of_timm("repvgg_a0", 64),
        of_timm("nf_resnet26", 64),
        of_timm("resnet10t", 64),
        of_timm("hrnet_w18_small", 64),
    ]


def randomised(net: nn.Module) -> nn.Module:
    """Buffers and weights that start at zero or one would hide paths; a little noise shows them."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.data.add_(0.02 * noise)
    return net


def of_transformers(
    family: str,
    point: Tensor | None = None,
    feed: str = "inputs_embeds",
    read: str = "last_hidden_state",
    causal: bool = False,
    kind: str = "Model",
    given: Mapping[str, Any] | None = None,
    **options: Any,
) -> Model:
    """A model by the prefix of its classes, fed by one keyword argument."""

    def make() -> tuple[Callable[[Tensor], Tensor], Tensor]:
        package = library("transformers")
        config = getattr(package, f"{family}Config")(**options)
        net = randomised(getattr(package, f"{family}{kind}")(config)).eval().double()
        more = dict(given or {})
        x = torch.randn(1, STEPS, WIDTH) if point is None else point
        return lambda x: getattr(net(**{feed: x}, **more), read), x

    return Model("transformers", f"{family}{kind}", make, causal)


TEXT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
    "vocab_size": WORDS,
    "max_position_embeddings": 32,
}
DECODER = {**TEXT, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0}
HEADED = {**DECODER, "head_dim": 8}
PICTURE = {"image_size": 16, "patch_size": 8}
SEEING = {k: v for k, v in TEXT.items() if k not in ("vocab_size", "max_position_embeddings")}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32, "vocab_size": WORDS}
CONVOLVED = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
SOUND = {**CONVOLVED, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}


def encoders() -> list[Model]:
    pictures = torch.randn(1, 3, 16, 16)
    return [
        of_transformers("Bert", **TEXT),
        of_transformers("Roberta", **TEXT),
        of_transformers(
            "DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=WORDS
        ),
        of_transformers("Albert", embedding_size=32, **TEXT),
        of_transformers("Electra", embedding_size=32, **TEXT),
        of_transformers("DebertaV2", relative_attention=True, pos_att_type="p2c|c2p", **TEXT),
        of_transformers("MPNet", **TEXT),
        of_transformers("ModernBert", local_attention=4, **TEXT, pad_token_id=0),
        of_transformers("FNet", **{**TEXT, "num_attention_heads": HEADS}),
        of_transformers(
            "T5",
            kind="EncoderModel",
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            vocab_size=WORDS,
        ),
        of_transformers("ViT", pictures, "pixel_values", **SEEING, **PICTURE),
        of_transformers("DeiT", pictures, "pixel_values", **SEEING, **PICTURE),
        of_transformers("Dinov2", pictures, "pixel_values", **SEEING, **PICTURE),
        of_transformers("CLIPVision", pictures, "pixel_values", **SEEING, **PICTURE),
        of_transformers(
            "ResNet",
            pictures,
            "pixel_values",
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
        ),
        of_transformers(
            "Wav2Vec2",
            torch.randn(1, 160),
            "input_values",
            **SEEING,
            **SOUND,
            num_feat_extract_layers=2,
        ),
    ]


def decoders() -> list[Model]:
    def decoder(family: str, **options: Any) -> Model:
        return of_transformers(family, causal=True, **options)

    return [
        decoder("GPT2", **GPT, use_cache=False),
        decoder("GPTNeoX", **TEXT, use_cache=False),
        decoder(
            "OPT",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            vocab_size=WORDS,
            max_position_embeddings=32,
            word_embed_proj_dim=32,
            use_cache=False,
        ),
        decoder("Bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=WORDS, use_cache=False),
        decoder("Llama", **DECODER),
        decoder("Mistral", **DECODER, sliding_window=4),
        decoder("Qwen2", **DECODER),
        decoder("Qwen3", **HEADED),
        decoder("Gemma", **HEADED),
        decoder("Gemma2", **HEADED, sliding_window=4),
        decoder("Phi", **{**DECODER, "num_key_value_heads": HEADS}),
        decoder(
            "Falcon",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=WORDS,
            use_cache=False,
        ),
        decoder("Mixtral", **DECODER, **EXPERTS, experts_implementation="eager"),
        decoder(
            "Mamba",
            hidden_size=16,
            state_size=4,
            num_hidden_layers=1,
            vocab_size=WORDS,
            use_cache=False,
        ),
        decoder(
            "Mamba2",
            hidden_size=16,
            state_size=4,
            num_heads=4,
            head_dim=8,
            n_groups=1,
            num_hidden_layers=1,
            vocab_size=WORDS,
            chunk_size=4,
            use_cache=False,
        ),
        decoder(
            "Rwkv",
            hidden_size=16,
            attention_hidden_size=16,
            num_hidden_layers=1,
            vocab_size=WORDS,
            context_length=32,
            use_cache=False,
        ),
    ]


def heard() -> list[Model]:
    """Whisper's encoder, which takes a spectrogram."""

    def make() -> tuple[Callable[[Tensor], Tensor], Tensor]:
        package = library("transformers")
        sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4}
        config = package.WhisperConfig(
            **sizes, encoder_ffn_dim=64, num_mel_bins=8, max_source_positions=8, vocab_size=WORDS,
            decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )  # fmt: skip
        net = randomised(package.WhisperModel(config).encoder).eval().double()
        return lambda x: net(x).last_hidden_state, torch.randn(1, 8, 16)

    return [Model("transformers", "WhisperEncoder", make)]


def everything() -> list[Model]:
    return [*torchvision_models(), *timm_models(), *encoders(), *heard(), *decoders()]
