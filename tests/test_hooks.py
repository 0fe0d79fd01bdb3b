"""Hooks: registered, run, removed, whatever happens; and never another thread's business."""

import random
import threading

import pytest
import torch
import torch.nn.functional as F
from families import build
from torch import nn

import vitfeats as vf
from vitfeats.hooks import Probe, Substitute, capture, count_hooks, find_module, unwrapped


class Chain(nn.Module):
    """Five layers in a row that note how far a pass came."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.reached: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x)
            self.reached.append(index)
        return x


def _same(seen):
    return seen.clone()


def _probes(*paths: str, where: str = "output") -> dict[str, Probe]:
    return {path: Probe(path, _same, where) for path in paths}


def test_values_are_those_of_the_model_and_the_pass_ends_at_the_deepest():
    chain, x = Chain(), torch.randn(2, 4)
    expected = chain.layers[1](chain.layers[0](x))
    values = capture(chain, _probes("layers.1", "layers.0"), lambda model: model(x))
    assert list(values) == ["layers.1", "layers.0"]
    assert torch.equal(values["layers.1"], expected)
    assert chain.reached == [0], "layer 1's hook ends the pass before the layer is noted as done"


def test_without_stop_the_pass_runs_to_its_end():
    chain = Chain()
    capture(chain, _probes("layers.0"), lambda model: model(torch.zeros(1, 4)), stop=False)
    assert chain.reached == [0, 1, 2, 3, 4]


def test_models_with_offload_hooks_run_to_their_end():
    chain = Chain()
    chain.layers[4]._hf_hook = object()
    capture(chain, _probes("layers.0"), lambda model: model(torch.zeros(1, 4)))
    assert chain.reached == [0, 1, 2, 3, 4]


def test_input_probe_sees_the_input_positional_or_by_keyword():
    layer, x = nn.Linear(4, 4), torch.randn(1, 4)
    root = nn.ModuleDict({"layer": layer})
    for call in (lambda m: m["layer"](x), lambda m: m["layer"](input=x)):
        assert torch.equal(capture(root, _probes("layer", where="input"), call)["layer"], x)


def test_attention_probe_sees_queries_and_keys():
    model = build("timm-augreg")
    seen = capture(
        model,
        {"a": Probe("blocks.1.attn", lambda call: [t.shape for t in call[0][:3]], "attention")},
        lambda m: m(torch.rand(1, 3, 64, 64)),
    )["a"]
    assert seen == [(1, 4, 17, 12)] * 3


def test_what_attends_in_place_of_one_module_is_called_there_alone():
    model, seen = build("timm-augreg"), []

    def noted(func, args, kwargs):
        seen.append(args[0].shape)
        return func(args[0], args[1], torch.zeros_like(args[2]), **kwargs)

    def run(m):
        m(torch.rand(1, 3, 64, 64))

    probes = _probes("blocks.0.attn.proj", "blocks.1.attn.proj", where="input")
    probes["a"] = Probe("blocks.1.attn", lambda call: call[0][2].abs().max(), "attention")
    values = capture(model, probes, run, attend={"blocks.1.attn": noted})
    assert seen == [(1, 4, 17, 12)]
    assert values["a"] > 0  # a probe sees what the module asked for
    assert [bool(values[f"blocks.{i}.attn.proj"].any()) for i in (0, 1)] == [True, False]
    assert count_hooks(model) == 0


def test_on_value_streams_and_nothing_is_kept():
    chain, seen = Chain(), []
    values = capture(
        chain,
        _probes("layers.0", "layers.2"),
        lambda model: model(torch.zeros(1, 4)),
        on_value=lambda name, value: seen.append((name, tuple(value.shape))),
    )
    assert seen == [("layers.0", (1, 4)), ("layers.2", (1, 4))]
    assert values == {}


def test_substitute_changes_one_modules_input_for_one_pass():
    chain, x = Chain(), torch.randn(1, 4)
    twice = Substitute("layers.0", lambda given: (2 * given,))
    changed = capture(chain, _probes("layers.0"), lambda model: model(x), substitutes=[twice])["layers.0"]
    assert torch.equal(changed, chain.layers[0](2 * x))
    assert count_hooks(chain) == 0


def test_a_substitute_leaves_other_threads_alone():
    chain, x = Chain(), torch.randn(1, 4)
    other: list[torch.Tensor] = []

    def run(model: nn.Module) -> None:
        thread = threading.Thread(target=lambda: other.append(chain.layers[0](x)))
        thread.start()
        thread.join()
        model(x)

    twice = Substitute("layers.0", lambda given: (2 * given,))
    capture(chain, _probes("layers.1"), run, substitutes=[twice])
    assert torch.equal(other[0], chain.layers[0](x))


def test_handlers_replace_a_function_in_this_thread_only():
    x = torch.randn(1, 1, 4, 4)
    root = nn.ModuleDict({"same": nn.Identity()})
    other: list[torch.Tensor] = []

    def run(model: nn.Module) -> None:
        thread = threading.Thread(target=lambda: other.append(F.interpolate(x, size=(2, 2))))
        thread.start()
        thread.join()
        model["same"](F.interpolate(x, size=(2, 2)))

    seen = capture(root, _probes("same"), run, handlers={F.interpolate: lambda _f, args, _k: args[0] * 0 + 7})["same"]
    assert bool((seen == 7).all())
    assert torch.equal(other[0], F.interpolate(x, size=(2, 2)))


def test_a_path_that_does_not_exist_names_what_does():
    with pytest.raises(vf.TapError, match=r"a module at 'layers.7' of Chain, but 'layers' has no '7'; it has 0, 1, 2"):
        capture(Chain(), _probes("layers.0", "layers.7"), lambda model: model(torch.zeros(1, 4)))
    with pytest.raises(vf.TapError, match="'the model' has no 'nose'; it has layers"):
        find_module(Chain(), "nose")


def test_a_probe_that_never_fires():
    chain = Chain()
    with pytest.raises(vf.TapError, match=r"expected 'layers.3' to run .* never did; the model may go around"):
        capture(chain, _probes("layers.3"), lambda model: model.layers[0](torch.zeros(1, 4)))
    assert count_hooks(chain) == 0


def test_a_probe_that_fires_twice():
    chain = Chain()
    chain.layers[1] = chain.layers[0]
    with pytest.raises(vf.TapError, match=r"expected 'layers.0' to run once .* ran again"):
        capture(chain, _probes("layers.0", "layers.4"), lambda model: model(torch.zeros(1, 4)))
    assert count_hooks(chain) == 0


def test_attention_that_is_not_fused_names_the_switch():
    model = build("timm-dinov3")
    for block in model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(vf.TapError, match=r"inside 'blocks.0.attn', got none; .*TIMM_FUSED_ATTN"):
        vf.load_extractor(model, size=64)(torch.rand(1, 3, 64, 64), "attention@0")


def test_a_compiled_model_is_unwrapped():
    chain = Chain()
    compiled = torch.compile(chain, backend="eager")
    assert unwrapped(compiled) is chain
    assert unwrapped(chain) is chain
    assert capture(compiled, _probes("layers.0"), lambda model: model(torch.zeros(1, 4)))["layers.0"].shape == (1, 4)


class _Chance(Exception):
    """What the test raises at random places."""


def test_no_hook_is_left_after_a_thousand_failures_at_random_places():
    model = build("timm-augreg")
    own = model.blocks[2].register_forward_hook(lambda *_: None)  # somebody else's hook must stay
    extractor = vf.load_extractor(model, size=32)
    image = torch.rand(1, 3, 32, 32)
    dice = random.Random(0)
    modules = [module for module in model.modules() if not list(module.children())]
    before = count_hooks(model)
    raised = 0
    for _ in range(1000):
        victim = dice.choice(modules)
        original = victim.forward

        def fail(*_args, **_kwargs):
            raise _Chance

        victim.forward = fail
        try:
            extractor(image, ["key@0", "token@1", "attention@2"])
        except _Chance:
            raised += 1
        finally:
            victim.forward = original
        assert count_hooks(model) == before
    own.remove()
    assert count_hooks(model) == 0
    assert raised > 300, "most places lie on the way of a pass that ends in the last block"


def test_eight_threads_get_the_serial_bits():
    extractor = vf.load_extractor("mini", size=64, device="cpu")
    images = [torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    taps = [
        ["key@11"],
        ["key@2", "token@5"],
        ["attention@4"],
        ["cls@11"],
        ["value@0"],
        ["out@7"],
        ["query@9"],
        ["key@3"],
    ]
    serial = [extractor(image, tap) for image, tap in zip(images, taps, strict=True)]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(50):
                for tap, descriptor in extractor(images[number], taps[number]).items():
                    assert torch.equal(descriptor.features, serial[number][tap].features)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert count_hooks(extractor.model) == 0
