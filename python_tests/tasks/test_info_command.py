"""`flexattn info`."""

from __future__ import annotations

import torch

import flexattn_cuda
from flexattn_cuda import FlexAttnConfig, FlexAttnLlavaConfig


def test_info_prints_versions_build_and_paths(flexattn, monkeypatch):
    monkeypatch.setattr("flexattn_cuda.build.cuda_unavailable_reason", lambda *_: "no GPU is seen")
    code, out, _ = flexattn("info")
    assert code == 0
    for fact in (flexattn_cuda.__version__, torch.__version__, "transformers", "no GPU is seen"):
        assert fact in out


def test_info_estimates_the_memory_of_a_model(flexattn, tmp_path):
    config = FlexAttnLlavaConfig(flexattn_config=FlexAttnConfig().to_dict())  # 7B; there are no weights to load
    config.save_pretrained(tmp_path)
    code, out, _ = flexattn("info", "--model", tmp_path)
    assert code == 0
    for line in ("HR projections", "sequence cache", "HR cache, 43%", "HR cache, all", "barely enough", "not enough"):
        assert line in out
