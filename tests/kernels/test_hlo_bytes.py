"""Counting a program's bytes: a scheduled program written by hand, of which each rule takes a line."""

from __future__ import annotations

import pytest

from bench.hlo_bytes import Op, count

PROGRAM = """HloModule m, is_scheduled=true

%slice_of (p: f32[8,4,128], q: s32[]) -> f32[4,128] {
  %p = f32[8,4,128]{2,1,0:T(4,128)} parameter(0)
  %q = s32[]{:T(128)} parameter(1)
  ROOT %ds = f32[1,4,128]{2,1,0:T(4,128)} dynamic-slice(%p, %q), dynamic_slice_sizes={1,4,128}
}

%inner (a: f32[8,4,128], b: s32[], c: f32[8,4,128]) -> f32[8,4,128] {
  %a = f32[8,4,128]{2,1,0:T(4,128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  %c = f32[8,4,128]{2,1,0:T(4,128)} parameter(2)
  %part = f32[1,4,128]{2,1,0:T(4,128)} fusion(%a, %b), kind=kLoop, calls=%slice_of
  ROOT %dus = f32[8,4,128]{2,1,0:T(4,128)} dynamic-update-slice(%c, %part, %b)
}

%body (t: (s32[], f32[8,4,128], f32[8,4,128])) -> (s32[], f32[8,4,128], f32[8,4,128]) {
  %t = (s32[]{:T(128)S(6)}, f32[8,4,128]{2,1,0:T(4,128)}, /*index=2*/f32[8,4,128]{2,1,0:T(4,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%t), index=0
  %x = f32[8,4,128]{2,1,0:T(4,128)} get-tuple-element(%t), index=1
  %y = f32[8,4,128]{2,1,0:T(4,128)} get-tuple-element(%t), index=2
  %step = f32[8,4,128]{2,1,0:T(4,128)} fusion(%x, %i, %y), kind=kLoop, calls=%inner
  %near = f32[4,128]{1,0:T(4,128)S(1)} broadcast(%i), dimensions={}
  %call = f32[4,128]{1,0:T(4,128)S(1)} custom-call(%near, %x), custom_call_target="tpu_custom_call"
  ROOT %out = (s32[]{:T(128)S(6)}, f32[8,4,128]{2,1,0:T(4,128)}, f32[8,4,128]{2,1,0:T(4,128)}) tuple(%i, %x, %step)
}

%condition (t: (s32[], f32[8,4,128], f32[8,4,128])) -> pred[] {
  %t = (s32[]{:T(128)S(6)}, f32[8,4,128]{2,1,0:T(4,128)}, f32[8,4,128]{2,1,0:T(4,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%t), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (x: f32[8,4,128], y: f32[8,4,128], i: s32[]) -> f32[8,4,128] {
  %x = f32[8,4,128]{2,1,0:T(4,128)} parameter(0)
  %y = f32[8,4,128]{2,1,0:T(4,128)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %copy-start = (f32[8,4,128]{2,1,0:T(4,128)S(1)}, f32[8,4,128]{2,1,0:T(4,128)}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = f32[8,4,128]{2,1,0:T(4,128)S(1)} copy-done(%copy-start)
  %all = (s32[]{:T(128)S(6)}, f32[8,4,128]{2,1,0:T(4,128)}, f32[8,4,128]{2,1,0:T(4,128)}) tuple(%i, %x, %y)
  %loop = (s32[]{:T(128)S(6)}, f32[8,4,128]{2,1,0:T(4,128)}, f32[8,4,128]{2,1,0:T(4,128)}) while(%all), condition=%condition, body=%body
  ROOT %neg = f32[8,4,128]{2,1,0:T(4,128)} negate(%copy-done)
}
"""  # noqa: E501
LAYER = 4 * 128 * 4


def test_each_rule() -> None:
    """A slice through two fusions and the update in place, five trips; one side of a copy; what is near is free."""
    found = count(PROGRAM, lambda op, shapes: 1000 * len(shapes))
    assert found == {
        "fusion step": 5 * 2 * LAYER,
        "custom-call call": 5 * 2000,
        "copy-start copy-start": 8 * LAYER,
        "negate neg": 8 * LAYER,
    }


def test_an_operand_that_is_read_whole_counts_whole() -> None:
    """Used once besides its slice, it is no slice any more."""
    used = "dynamic-update-slice(%c, %part, %b)"
    whole = PROGRAM.replace(f"ROOT %dus = f32[8,4,128]{{2,1,0:T(4,128)}} {used}", "ROOT %n = f32[8,4,128] add(%a, %c)")
    assert whole != PROGRAM
    assert count(whole, lambda op, shapes: 0)["fusion step"] == 5 * 3 * 8 * LAYER


def test_the_copies_of_the_decode_kernel() -> None:
    """A page of keys and values comes, a tile of tokens of both goes back."""
    tpu_bytes = pytest.importorskip("bench.tpu_bytes")
    found = tpu_bytes.copies_of(rows=8, heads=8, kv_heads=2, size=128)
    assert found == tpu_bytes.Attention(page=2 * 128 * 256 * 2, row=2 * 16 * 256 * 2)


def test_a_call_has_a_name_and_operands() -> None:
    seen: list[tuple[Op, list[str]]] = []
    count(PROGRAM, lambda op, shapes: seen.append((op, shapes)) or 0)  # type: ignore[func-returns-value]
    assert [(op.name, len(shapes)) for op, shapes in seen] == [("call", 2)]
