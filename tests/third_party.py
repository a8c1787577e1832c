"""Networks of other packages that hold nn.BatchNorm1d: tiny ones, built from their classes with random weights."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support import normal

F64 = torch.float64
Inputs = tuple[Tensor, ...]
_KEPT: list[torch.library.Library] = []  # an operator lives as long as the library that defined it


@functools.cache
def make_torchvision_importable() -> None:
    """Define what torchvision registers itself for where its compiled part does not load.

    The wheels of PyPI are linked against CUDA, so beside a CPU build of torch they find none of their operators.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


@contextmanager
def imported_as(cls: type[nn.BatchNorm1d], package: str) -> Iterator[None]:
    """Have the package's modules, and torch.nn, hold cls under every name that they hold nn.BatchNorm1d under."""
    native = nn.BatchNorm1d
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name in ("torch.nn", "torch.nn.modules") or name.split(".")[0] == package:
                for key in [k for k, value in vars(module).items() if value is native]:
                    patch.setattr(module, key, cls)
        yield


def floats(*shape: int) -> Callable[[int], Inputs]:
    """One tensor of normal values, another one for each seed."""
    return lambda seed: (normal(shape, F64, seed=seed),)


@dataclass(frozen=True)
class Case:
    """A network, what it takes, and what is known of it."""

    package: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    fuses: bool = False  # its code shows an activation right behind a batch norm
    input_gradient: bool = True  # some round their input to float32 (TabNet) or need a leaf for it (wav2vec2)


# ---- tables ----


def tabnet(mask: str, virtual: int, outputs: int | list[int] = 2) -> Callable[[], nn.Module]:
    """Ghost batch norm is the same module called for each part of the batch, the last one smaller."""

    def build() -> nn.Module:
        from pytorch_tabnet.tab_network import TabNetNoEmbeddings

        return TabNetNoEmbeddings(
            6, outputs, n_d=3, n_a=4, n_steps=2, virtual_batch_size=virtual, mask_type=mask,
            group_attention_matrix=torch.eye(6),
        )  # fmt: skip

    return build


def tabnet_with_embeddings() -> nn.Module:
    from pytorch_tabnet.tab_network import TabNet

    return TabNet(
        5, 2, n_d=3, n_a=3, n_steps=2, cat_idxs=[1, 3], cat_dims=[4, 3], cat_emb_dim=[2, 2], virtual_batch_size=4,
        group_attention_matrix=torch.eye(5),
    )  # fmt: skip


def tabnet_pretraining() -> nn.Module:
    from pytorch_tabnet.tab_network import TabNetPretraining

    return TabNetPretraining(
        6, n_d=3, n_a=4, n_steps=2, virtual_batch_size=5, n_shared_decoder=1, n_indep_decoder=1,
        group_attention_matrix=torch.eye(6),
    )  # fmt: skip


def table_with_categories(seed: int) -> Inputs:
    x = normal((11, 5), F64, seed=seed)
    x[:, 1], x[:, 3] = torch.arange(11) % 4, torch.arange(11) % 3
    return (x,)


def rtdl_resnet() -> nn.Module:
    from rtdl_revisiting_models import ResNet

    return ResNet(
        d_in=5, d_out=2, n_blocks=2, d_block=6, d_hidden=None, d_hidden_multiplier=1.5, dropout1=0.2, dropout2=0.1
    )


# ---- graphs ----


def graph(seed: int) -> Inputs:
    """Eight nodes in a ring with some chords, both ways."""
    one = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 0, 2, 5], [1, 2, 3, 4, 5, 6, 7, 0, 4, 6, 1]])
    return normal((8, 5), F64, seed=seed), torch.cat((one, one.flip(0)), 1)


def graph_with_edge_features(seed: int) -> Inputs:
    x, edges = graph(seed)
    return x, edges, normal((edges.shape[1], 3), F64, seed=seed + 50)


def nodes_and_batch(seed: int) -> Inputs:
    x, edges = graph(seed)
    return x, edges, torch.tensor([0] * 8)


def geometric(name: str, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torch_geometric.nn
        import torch_geometric.nn.models

        made: nn.Module = getattr(torch_geometric.nn, name)(*arguments, **options)
        return made

    return build


# ---- pictures ----


def levit(**options: Any) -> nn.Module:
    from timm.models.levit import Levit

    return Levit(
        img_size=32, in_chans=2, num_classes=3, embed_dim=(8, 12), key_dim=4, depth=(1, 1), num_heads=(2, 3),
        stem_type="s8", **options,
    )  # fmt: skip


def levit_distilled() -> nn.Module:
    from timm.models.levit import LevitDistilled

    return LevitDistilled(
        img_size=16, in_chans=2, num_classes=3, embed_dim=(8,), key_dim=4, depth=(2,), num_heads=(2,), stem_type="s8"
    )


def efficientvit() -> nn.Module:
    from timm.models.efficientvit_msra import EfficientVitMsra

    return EfficientVitMsra(
        img_size=64, in_chans=2, num_classes=3, embed_dim=(8, 8, 8), key_dim=(4, 4, 4), depth=(1, 1, 1),
        num_heads=(2, 2, 2), window_size=(2, 2, 2), kernels=(3, 3),
    )  # fmt: skip


def repvit() -> nn.Module:
    from timm.models.repvit import RepVit

    return RepVit(in_chans=2, img_size=32, num_classes=3, embed_dim=(8, 8), depth=(1, 1), distillation=True)


def head(name: str, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from lightly.models.modules import heads

        made: nn.Module = getattr(heads, name)(*arguments, **options)
        return made

    return build


# ---- sound and series ----


SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
# The convolutions over the wave, and masks that are drawn with NumPy's generator switched off.
WAVE = {
    "conv_dim": (6, 6), "conv_stride": (3, 2), "conv_kernel": (5, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
}  # fmt: skip


def transformer(config: str, model: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return made

    return build


def conformer(positions: str) -> Callable[[], nn.Module]:
    return transformer(
        "Wav2Vec2ConformerConfig", "Wav2Vec2ConformerModel", **SMALL, **WAVE, position_embeddings_type=positions,
        conv_depthwise_kernel_size=3, max_source_positions=40,
    )  # fmt: skip


PATCHES = {"context_length": 16, "patch_length": 4, "num_input_channels": 3, "prediction_length": 2}


def patch_tst(model: str) -> Callable[[], nn.Module]:
    return transformer(
        "PatchTSTConfig", model, **PATCHES, patch_stride=4, norm_type="batchnorm", d_model=8, num_attention_heads=2,
        num_hidden_layers=2, ffn_dim=12, attention_dropout=0.1, path_dropout=0.1,
    )  # fmt: skip


def patch_mixer() -> nn.Module:
    return transformer(
        "PatchTSMixerConfig", "PatchTSMixerModel", **PATCHES, patch_stride=4, norm_mlp="BatchNorm", d_model=6,
        num_layers=2,
    )()  # fmt: skip


def speech_postnet() -> nn.Module:
    from transformers import SpeechT5Config
    from transformers.models.speecht5.modeling_speecht5 import SpeechT5SpeechDecoderPostnet

    return SpeechT5SpeechDecoderPostnet(
        SpeechT5Config(hidden_size=8, num_mel_bins=4, reduction_factor=2, speech_decoder_postnet_units=6,
                       speech_decoder_postnet_layers=3, speech_decoder_postnet_kernel=3)
    )  # fmt: skip


def superglue_encoder() -> nn.Module:
    from transformers import SuperGlueConfig
    from transformers.models.superglue.modeling_superglue import SuperGlueMultiLayerPerceptron

    return nn.Sequential(*(SuperGlueMultiLayerPerceptron(SuperGlueConfig(), i, o) for i, o in ((5, 6), (6, 4))))


def huggingface_levit() -> nn.Module:
    return transformer(
        "LevitConfig", "LevitForImageClassificationWithTeacher", image_size=32, num_channels=2, kernel_size=3,
        patch_size=16, hidden_sizes=[16, 16, 16], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[4, 4, 4],
        drop_path_rate=0, mlp_ratio=[2, 2, 2], attention_ratio=[2, 2, 2], num_labels=3,
    )()  # fmt: skip


def hubert() -> nn.Module:
    return transformer("HubertConfig", "HubertModel", **SMALL, **WAVE, conv_pos_batch_norm=True)()


def parakeet() -> nn.Module:
    return transformer(
        "ParakeetEncoderConfig", "ParakeetEncoder", **SMALL, num_mel_bins=8, subsampling_conv_channels=4,
        conv_kernel_size=3, subsampling_factor=2,
    )()  # fmt: skip


ROW = floats(9, 6)
CASES: dict[str, Case] = {
    "TabNet": Case("pytorch_tabnet", tabnet("sparsemax", 4), floats(11, 6)),
    "TabNet, one ghost": Case("pytorch_tabnet", tabnet("entmax", 128, [2, 3]), floats(11, 6)),
    "TabNet, embeddings": Case(
        "pytorch_tabnet", tabnet_with_embeddings, table_with_categories, input_gradient=False
    ),
    "TabNet, pretraining": Case("pytorch_tabnet", tabnet_pretraining, floats(10, 6)),
    "tabular ResNet": Case("rtdl_revisiting_models", rtdl_resnet, floats(9, 5), fuses=True),
    "PyG BatchNorm": Case("torch_geometric", geometric("BatchNorm", 6), ROW),
    "PyG BatchNorm, bare": Case(
        "torch_geometric", geometric("BatchNorm", 6, momentum=None, affine=False, track_running_stats=False), ROW
    ),
    "PyG BatchNorm, average": Case(
        "torch_geometric", geometric("BatchNorm", 6, momentum=None, allow_single_element=True), ROW
    ),
    "PyG DiffGroupNorm": Case("torch_geometric", geometric("DiffGroupNorm", 6, groups=3), ROW),
    "PyG MLP": Case("torch_geometric", geometric("MLP", [6, 5, 4, 3], dropout=0.2), ROW),
    "PyG MLP, act first": Case(
        "torch_geometric", geometric("MLP", [6, 5, 3], act="LeakyReLU", act_first=True, plain_last=False), ROW
    ),
    "PyG GIN": Case("torch_geometric", geometric("GIN", 5, 6, 2, 3, norm="BatchNorm", dropout=0.2), graph),
    "PyG GCN": Case("torch_geometric", geometric("GCN", 5, 6, 2, 3, norm="batch_norm", jk="cat"), graph),
    "PyG CGConv": Case(
        "torch_geometric", geometric("CGConv", 5, dim=3, batch_norm=True), graph_with_edge_features
    ),
    "PyG GENConv": Case("torch_geometric", geometric("GENConv", 5, 4, norm="batch"), graph, fuses=True),
    "PyG LINKX": Case(
        "torch_geometric", geometric("LINKX", 8, 5, 6, 2, num_layers=2, num_edge_layers=2, num_node_layers=2), graph
    ),
    "PyG PMLP": Case("torch_geometric", geometric("PMLP", 5, 6, 2, num_layers=3), graph, fuses=True),
    "PyG SGFormer": Case("torch_geometric", geometric("SGFormer", 5, 6, 2), nodes_and_batch, fuses=True),
    "LeViT": Case("timm", levit, floats(6, 2, 32, 32)),
    "LeViT, distilled": Case("timm", levit_distilled, floats(6, 2, 16, 16)),
    "EfficientViT": Case("timm", efficientvit, floats(6, 2, 64, 64)),
    "RepViT": Case("timm", repvit, floats(6, 2, 32, 32)),
    "wav2vec2 conformer": Case("transformers", conformer("relative"), floats(4, 120), input_gradient=False),
    "wav2vec2 conformer, rotary": Case("transformers", conformer("rotary"), floats(4, 120), input_gradient=False),
    "PatchTST": Case("transformers", patch_tst("PatchTSTModel"), floats(4, 16, 3)),
    "PatchTST, prediction": Case("transformers", patch_tst("PatchTSTForPrediction"), floats(4, 16, 3)),
    "PatchTSMixer": Case("transformers", patch_mixer, floats(4, 16, 3)),
    "HuBERT": Case("transformers", hubert, floats(4, 120), input_gradient=False),
    "Parakeet": Case("transformers", parakeet, floats(4, 20, 8)),
    "SpeechT5 postnet": Case("transformers", speech_postnet, floats(4, 5, 8)),
    "SuperGlue encoder": Case("transformers", superglue_encoder, floats(4, 7, 5)),
    "LeViT of transformers": Case("transformers", huggingface_levit, floats(6, 2, 32, 32)),
}  # fmt: skip
HEADS: dict[str, tuple[Any, ...]] = {
    "BarlowTwinsProjectionHead": (6, 8, 5),
    "BYOLProjectionHead": (6, 8, 5),
    "BYOLPredictionHead": (6, 8, 5),
    "NNCLRProjectionHead": (6, 8, 5),
    "NNCLRPredictionHead": (6, 8, 5),
    "SimSiamProjectionHead": (6, 8, 5),
    "SimSiamPredictionHead": (6, 8, 5),
    "SMoGProjectionHead": (6, 8, 5),
    "SMoGPredictionHead": (6, 8, 5),
    "SwaVProjectionHead": (6, 8, 5),
    "MSNProjectionHead": (6, 8, 5),
    "TiCoProjectionHead": (6, 8, 5),
    "VICRegProjectionHead": (6, 8, 5, 3),
    "MMCRProjectionHead": (6, 8, 5),
    "SimCLRProjectionHead": (6, 8, 5, 3),
    "MoCoProjectionHead": (6, 8, 5, 2, True),
    "DINOProjectionHead": (6, 8, 5, 4, True),
}
for _name, _sizes in HEADS.items():
    CASES[f"lightly {_name}"] = Case("lightly", head(_name, *_sizes), ROW, fuses=True)
