"""Small models of torchvision, timm and transformers with random weights; nothing is downloaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
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
    """What makes a model and its point, and whether positions are to see earlier ones only."""

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


def of_torchvision(name: str, side: int, **options: Any) -> Model:
    def make() -> tuple[nn.Module, Tensor]:
        builder = getattr(library("torchvision.models"), name)
        return builder(**{"num_classes": CLASSES, **options}), image(side)

    return Model("torchvision", name, make)


def segmentation(name: str, side: int) -> Model:
    """One logit for each pixel of one image."""

    def make() -> tuple[Callable[[Tensor], Tensor], Tensor]:
        builder = getattr(library("torchvision.models.segmentation"), name)
        net = builder(weights=None, weights_backbone=None, num_classes=1).eval().double()
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
        segmentation("lraspp_mobilenet_v3_large", 16),
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
    """Weights that start at zero would hide paths; a little noise on all of them shows these."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.data.add_(0.02 * noise)
    return net


def of_transformers(
    family: str,
    shape: Sequence[int] = (1, STEPS, WIDTH),
    feed: str = "inputs_embeds",
    causal: bool = False,
    kind: str = "Model",
    **options: Any,
) -> Model:
    """A model by the prefix of its classes, fed by one keyword argument."""

    def make() -> tuple[Callable[[Tensor], Tensor], Tensor]:
        package = library("transformers")
        config = getattr(package, f"{family}Config")(**options)
        net = randomised(getattr(package, f"{family}{kind}")(config)).eval().double()
        return lambda x: net(**{feed: x}).last_hidden_state, torch.randn(*shape)

    return Model("transformers", f"{family}{kind}", make, causal)


SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
TEXT = {**SIZES, "intermediate_size": 64, "vocab_size": WORDS, "max_position_embeddings": 32}
DECODER = {**TEXT, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
HEADED = {**DECODER, "head_dim": 8}
SEEING = {**SIZES, "intermediate_size": 64, "image_size": 16, "patch_size": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32, **ENDS}
SHORT = {"vocab_size": WORDS, "use_cache": False}
SCANNED = {"hidden_size": WIDTH, "state_size": 4, "num_hidden_layers": 1, **SHORT, **ENDS}
CONVOLVED = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
SOUND = {**CONVOLVED, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
DISTILLED = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 64}
T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": HEADS}
DEBERTA = {"relative_attention": True, "pos_att_type": "p2c|c2p"}
RESIDUAL = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
MODERN = {"local_attention": 4, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, **ENDS}


def encoders() -> list[Model]:
    def seeing(family: str, **options: Any) -> Model:
        return of_transformers(family, (1, 3, 16, 16), "pixel_values", **options)

    return [
        of_transformers("Bert", **TEXT),
        of_transformers("Roberta", **TEXT),
        of_transformers("DistilBert", **DISTILLED, vocab_size=WORDS),
        of_transformers("Albert", embedding_size=WIDTH, **TEXT),
        of_transformers("Electra", embedding_size=WIDTH, **TEXT),
        of_transformers("DebertaV2", **DEBERTA, **TEXT),
        of_transformers("MPNet", **TEXT),
        of_transformers("ModernBert", **MODERN, **TEXT),
        of_transformers("FNet", **TEXT),
        of_transformers("T5", kind="EncoderModel", **T5, vocab_size=WORDS),
        seeing("ViT", **SEEING),
        seeing("DeiT", **SEEING),
        seeing("Dinov2", **SEEING),
        seeing("CLIPVision", **SEEING),
        seeing("ResNet", **RESIDUAL, layer_type="basic"),
        of_transformers(
            "Wav2Vec2", (1, 160), "input_values", **SIZES, intermediate_size=64, **SOUND
        ),
    ]


def decoders() -> list[Model]:
    def decoder(family: str, **options: Any) -> Model:
        return of_transformers(family, causal=True, **options)

    windows, steps = {"num_hidden_layers": 1, "sliding_window": 4}, (1, 16, WIDTH)
    return [
        decoder("GPT2", **GPT, **SHORT),
        decoder("GPTNeoX", **TEXT, use_cache=False),
        decoder("OPT", **SIZES, **SHORT, ffn_dim=64, word_embed_proj_dim=WIDTH),
        decoder("Bloom", **SHORT, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS),
        decoder("Llama", **DECODER),
        decoder("Mistral", shape=steps, **{**DECODER, **windows}),
        decoder("Qwen2", **DECODER),
        decoder("Qwen3", **HEADED),
        decoder("Gemma", **HEADED),
        decoder("Gemma2", **HEADED, sliding_window=4),
        decoder("Phi", **{**DECODER, "num_key_value_heads": HEADS}),
        decoder("Falcon", **SIZES, **SHORT),
        decoder("Mixtral", **DECODER, **EXPERTS),
        decoder("Mamba", **SCANNED),
        decoder("Mamba2", **SCANNED, num_heads=8, head_dim=8, n_groups=1, chunk_size=4),
        decoder("Rwkv", hidden_size=WIDTH, num_hidden_layers=LAYERS, context_length=32, **SHORT),
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
