"""Control vectors in GGUF files, against the gguf package, llama.cpp's arithmetic and hooks on the bare model."""
import builtins
import os
import pickle
import struct
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from test_direction import draw, hooked, same

from circuitbench.direction import given_direction
from circuitbench.gguf_file import read_control_vector, write_control_vector
from circuitbench.hook import HookedModel
from circuitbench.site import families

IDS = [5, 9, 41, 7, 200, 9, 3]


def deep(family, **changes):
    "A random model of four blocks."
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    config = families()[family].small(257, num_hidden_layers=4, **changes)
    return HookedModel(AutoModelForCausalLM.from_config(config), name=f'a deep {family}')


@pytest.fixture(scope='module', params=['llama', 'mamba2'])
def model(request): return deep(request.param)


@pytest.fixture(scope='module')
def mamba2(): return deep('mamba2')


def repeng(path, hint, directions, arch='controlvector', count=None, endianess=gguf.GGUFEndian.LITTLE, names=True):
    "A file as repeng's `export_gguf` makes it."
    writer = gguf.GGUFWriter(path, arch, endianess=endianess)
    if hint is not None: writer.add_string(f'{arch}.model_hint', hint)
    writer.add_uint32(f'{arch}.layer_count', len(directions) if count is None else count)
    for layer, v in directions.items(): writer.add_tensor(f'direction.{layer}' if names else layer, v)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vectors(*layers, width=32, dtype=np.float32): return {n: draw(width, seed=n).numpy().astype(dtype) for n in layers}


def llama_cpp(path, n_layer, strength=1.):
    "What llama.cpp adds to each block's output: `common_control_vector_load_one`, then `llama_adapter_cvec::apply`."
    data, width = np.zeros(0, np.float32), None
    for t in gguf.GGUFReader(path).tensors:
        layer, width = int(t.name.split('.')[1]), len(t.data)
        data = np.concatenate([data, np.zeros(max(0, width*layer - len(data)), np.float32)])
        data[width*(layer - 1):width*layer] += strength*t.data
    offset = {il: width*(il - 1) for il in range(1, n_layer)}
    return {il: data[o:o + width] for il, o in offset.items() if o + width <= len(data)}


# -- reading and writing -----------------------------------------------------------------
@torch.no_grad()
def test_a_file_of_repeng_does_what_llama_cpp_would(model, tmp_path):
    path = repeng(tmp_path/'v.gguf', model.config.model_type, vectors(3, 1))
    found = read_control_vector(path, model)
    assert list(found) == [1, 3] and [d.site for d in found.values()] == ['blocks.1.resid_post', 'blocks.3.resid_post']
    assert all(d.model == model.name and d.source == f'direction.{n}' and d.data == 'v.gguf' for n, d in found.items())
    for n, v in vectors(1, 3).items(): assert np.array_equal(found[n].vector.numpy(), v)
    ids, run = torch.tensor([IDS]), lambda: model.hf(torch.tensor([IDS])).logits
    for il, v in llama_cpp(path, model.n_layers, .5).items():
        run = lambda il=il, v=v, inner=run: hooked(model, il, lambda x: x + torch.tensor(v), inner)
    got = model.run(ids, edit=[d.push(.5*d.norm) for d in found.values()]).logits
    same(got, run())
    assert (got - model.run(ids).logits).abs().max() > .1


def test_what_is_written_is_read_by_the_package_and_by_us(model, tmp_path):
    made = {n: given_direction(model, v, 'resid_post', n) for n, v in vectors(3, 1, 2).items()}
    for given in (made, made.values(), [made[2], made[1], made[3]]):
        path = write_control_vector(tmp_path/'v.gguf', given, model)
        reader = gguf.GGUFReader(path)
        said = {k: f.contents() for k, f in reader.fields.items()}
        assert said['general.architecture'] == 'controlvector' and said['controlvector.model_hint'] == model.config.model_type
        assert said['controlvector.layer_count'] == 3
        assert reader.fields['controlvector.layer_count'].types == [gguf.GGUFValueType.UINT32]
        assert [t.name for t in reader.tensors] == ['direction.1', 'direction.2', 'direction.3']
        for t, d in zip(reader.tensors, (made[1], made[2], made[3])):
            assert t.tensor_type == gguf.GGMLQuantizationType.F32 and t.shape.tolist() == [32]
            assert bytes(t.data) == d.vector.numpy().tobytes()
        again = read_control_vector(path, model)
        assert list(again) == [1, 2, 3] and all(torch.equal(again[n].vector, made[n].vector) for n in again)
        assert [p.name for p in tmp_path.iterdir()] == ['v.gguf']
    theirs = repeng(tmp_path/'theirs.gguf', model.config.model_type, {n: made[n].vector.numpy() for n in (1, 2, 3)})
    assert theirs.read_bytes() == path.read_bytes()
    half = replace(made[1], vector=made[1].vector.half())
    again = read_control_vector(write_control_vector(path, [half], model), model)
    assert torch.equal(again[1].vector, half.vector.float())


@pytest.mark.parametrize('family, hints, wrong', [
    ('falcon-h1', ['falcon_h1', 'falcon-h1'], 'falcon'), ('granite-hybrid', ['granitemoehybrid', 'granitehybrid'], 'granite'),
    ('qwen3-5', ['qwen3_5_text', 'qwen3_5', 'qwen35'], 'qwen3'), ('falcon-mamba', ['falcon_mamba', 'mamba'], 'mamba2'),
    ('qwen3-next', ['qwen3_next', 'qwen3next'], 'qwen3')])
def test_the_model_may_be_named_as_either_names_it(family, hints, wrong, tmp_path):
    from circuitbench.load import load_model
    model = load_model(f'mock://{family}-tiny')
    file = lambda hint: repeng(tmp_path/'v', hint, vectors(1, width=model.sizes['d_model']))
    for hint in hints: assert list(read_control_vector(file(hint), model)) == [1]
    with pytest.raises(ValueError, match=f"a control vector for '{wrong}', expected one for {hints[0]}"):
        read_control_vector(file(wrong), model)


def test_other_counts_byte_orders_and_zeros(mamba2, tmp_path):
    assert list(read_control_vector(repeng(tmp_path/'a', 'mamba2', vectors(2), count=31), mamba2)) == [2]
    big = read_control_vector(repeng(tmp_path/'b', 'mamba2', vectors(2), endianess=gguf.GGUFEndian.BIG), mamba2)
    assert np.array_equal(big[2].vector.numpy(), vectors(2)[2])
    zeros = vectors(1, 2) | {3: np.zeros(32, np.float32)}
    assert list(read_control_vector(repeng(tmp_path/'c', 'mamba2', zeros), mamba2)) == [1, 2]


# -- what is refused ---------------------------------------------------------------------
def test_files_of_another_kind_are_refused(mamba2, tmp_path):
    cases = [
        (('mamba2', vectors(1), 'mamba2'), "a GGUF file of 'mamba2', expected one of 'controlvector'"),
        (('llama', vectors(1)), "a control vector for 'llama', expected one for mamba2"),
        ((None, vectors(1)), 'a control vector for None, expected one for mamba2'),
        (('mamba2', vectors(1, width=31)), r"'direction.1' of shape \(31,\), F32; expected \(32,\), F32"),
        (('mamba2', vectors(1, dtype=np.float16)), 'F16; expected'), (('mamba2', vectors(1, dtype=np.float64)), 'F64; expected'),
        (('mamba2', {1: np.ones((1, 32), np.float32)}), r'shape \(1, 32\)'),
        (('mamba2', {}), 'without directions'), (('mamba2', vectors(0, 1)), "'direction.0', expected direction.1 to direction.3"),
        (('mamba2', vectors(4)), "'direction.4', expected direction.1 to direction.3 for a deep mamba2"),
        (('mamba2', {1: vectors(1)[1], '01': vectors(1)[1]}), 'several directions of layer 1'),
        (('mamba2', {'1.weight': vectors(1)[1]}), "'direction.1.weight'"), (('mamba2', {'x': vectors(1)[1]}), "'direction.x'"),
        (('mamba2', {1: np.full(32, np.nan, np.float32)}), 'direction.1 at blocks.1.resid_post with numbers that are not finite')]
    for i, (args, match) in enumerate(cases):
        with pytest.raises(ValueError, match=match): read_control_vector(repeng(tmp_path/f'{i}', *args), mamba2)
    with pytest.raises(ValueError, match="'blk.1.weight', expected direction.1"):
        read_control_vector(repeng(tmp_path/'w', 'mamba2', {'blk.1.weight': vectors(1)[1]}, names=False), mamba2)


def test_damaged_files_are_refused(mamba2, tmp_path):
    whole = repeng(tmp_path/'v', 'mamba2', vectors(1, 2)).read_bytes()
    path = tmp_path/'broken'
    torch.save(torch.ones(32), path)
    endless = b'GGUF' + struct.pack('<IQQQ', 3, 0, 1, 1) + b'x' + struct.pack('<IIQ', 9, 0, 2**60) + bytes(99)     # an array
    cut = [whole[:n] for n in range(0, len(whole), 7)]
    for bad in (path.read_bytes(), pickle.dumps([1.]), b'', b'GGUF', b'{}', endless, *cut):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match='cannot be read|got .*broken'): read_control_vector(path, mamba2)
    for n in range(4, len(whole) - 256):                                    # a byte of the header: refused, or of no weight
        for value in (0, 9, 255):
            path.write_bytes(whole[:n] + bytes([value]) + whole[n + 1:])
            try: read_control_vector(path, mamba2)
            except ValueError: pass
    with pytest.raises(FileNotFoundError): read_control_vector(tmp_path/'none', mamba2)


def test_directions_without_a_place_are_refused(mamba2, tmp_path):
    made = {n: given_direction(mamba2, v, 'resid_post', n) for n, v in vectors(0, 1, 2, 3).items()}
    inner = given_direction(mamba2, draw(32), 'mixer_out', 1)
    heads = given_direction(mamba2, draw(1, 16, 8), 'ssm.state', 1, heads=[2])
    for given, match in [
        ([inner], 'got a direction of blocks.1.mixer_out, expected one of blocks.1.resid_post or a later block'),
        ([heads], 'blocks.1.ssm.state'), ([given_direction(mamba2, draw(32), 'embed')], 'of embed'), ([made[0]], 'blocks.0.resid_post'),
        ([made[1], made[1]], 'several directions of blocks.1.resid_post'), ({2: made[1]}, 'for layer 2, expected 1'), ([], 'no directions'),
        ([made[1], replace(made[2], model='tiny://mamba2')], 'tiny://mamba2'), ([replace(made[1], vector=draw(31))], r'\(31,\)')]:
        with pytest.raises(ValueError, match=match): write_control_vector(tmp_path/'v', given, mamba2)
    with pytest.raises(TypeError, match='got Tensor, expected a Direction'): write_control_vector(tmp_path/'v', [draw(32)], mamba2)
    assert not [*tmp_path.iterdir()]


def test_an_interrupt_loses_nothing(mamba2, tmp_path, monkeypatch):
    one, two = (given_direction(mamba2, draw(32, seed=s), 'resid_post', 1) for s in (0, 1))
    path = write_control_vector(tmp_path/'v', [one], mamba2)
    def _stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(gguf.GGUFWriter, 'write_tensors_to_file', _stop)
    with pytest.raises(KeyboardInterrupt): write_control_vector(path, [two], mamba2)
    assert torch.equal(read_control_vector(path, mamba2)[1].vector, one.vector) and os.listdir(tmp_path) == ['v']


def test_a_missing_package_is_named(mamba2, tmp_path, monkeypatch):
    real = builtins.__import__
    def _without(name, *more, **options):
        if name == 'gguf': raise ImportError(name)
        return real(name, *more, **options)
    monkeypatch.setattr(builtins, '__import__', _without)
    monkeypatch.delitem(sys.modules, 'gguf')
    for call in (lambda: read_control_vector(tmp_path/'v', mamba2), lambda: write_control_vector(tmp_path/'v', [], mamba2)):
        with pytest.raises(ImportError, match='got no gguf, expected it: pip install gguf'): call()
