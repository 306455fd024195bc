"""Which configuration of the matmul is taken for shapes that were, and were not, tuned."""

import json
import warnings

import pytest

from pallas_kernels.device_traits import UNKNOWN, DeviceTraits, traits_of
from pallas_kernels.mixed_matmul import configs, tuned_table
from pallas_kernels.mixed_matmul.mosaic_gpu import config as mosaic_gpu_config
from pallas_kernels.mixed_matmul.mosaic_gpu.config import MosaicGpuConfig
from pallas_kernels.mixed_matmul.triton_few_tokens import FewTokensConfig
from pallas_kernels.mixed_matmul.triton_many_tokens import ManyTokensConfig
from pallas_kernels.mixed_matmul.triton_tiles import Problem

WIDE = MosaicGpuConfig(128, 2, 6, 2, parts=2)
NARROW = MosaicGpuConfig(64, 1, 8, 4, parts=1)
TRITON = FewTokensConfig(16, 8, 8, 1, 1, "none")


def problem(m: int, n: int, k: int, share: float = 0.0, group_size: int = 128) -> Problem:
    n8 = round(n * share)
    return Problem(m, k, group_size, n - n8, n8)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch):
    """Sets the entries of the table."""

    def use(*entries: configs.Entry) -> None:
        monkeypatch.setattr(configs, "read_table", lambda device_kind: entries)

    return use


def test_a_tuned_case_gets_what_was_tuned(table):
    table(
        configs.Entry(128, 4096, 4096, 128, 0.0, NARROW, 50.0),
        configs.Entry(256, 4096, 4096, 128, 0.0, WIDE, 20.0),  # would do 128 tokens in 20 us
    )
    assert configs.choose(problem(128, 4096, 4096), "NVIDIA H100 80GB HBM3", "mosaic_gpu") is NARROW
    assert configs.choose(problem(256, 4096, 4096), "NVIDIA H100 80GB HBM3", "mosaic_gpu") is WIDE


def test_tiles_that_leave_multiprocessors_idle_are_not_taken(table):
    # 132 tiles of 128 x 128, one wave, in 30 us; the same work in 64 x 64 takes 36 us.
    table(
        configs.Entry(512, 4224, 4096, 128, 0.0, WIDE, 30.0),
        configs.Entry(512, 4224, 4096, 128, 0.0, NARROW, 36.0),
    )
    # 136 tiles are a second, empty wave; 544 tiles of 64 x 64 are 5 waves instead of 4.
    assert configs.waves(WIDE, problem(512, 4352, 4096)) == 2
    assert configs.choose(problem(512, 4352, 4096), "NVIDIA H100 80GB HBM3", "mosaic_gpu") is NARROW
    # 4 x 66 tiles fill two waves.
    assert configs.choose(problem(512, 8448, 4096), "NVIDIA H100 80GB HBM3", "mosaic_gpu") is WIDE


def test_half_tiles_of_a_last_wave_take_less_than_a_wave():
    unsigned = MosaicGpuConfig(128, 2, 4, 4, parts=1, unsigned=True)
    assert configs.waves(unsigned, problem(512, 6144, 4096)) == pytest.approx(1.6)  # 192 tiles: 60 in the second wave
    assert configs.waves(WIDE, problem(512, 6144, 4096)) == 2
    assert configs.waves(unsigned, problem(256, 14336, 4096)) == 2  # 92 tiles in the second wave: too many to halve
    assert configs.waves(unsigned, problem(256, 4096, 4096)) == 1  # a first wave is not halved


def test_8_bit_tiles_take_longer_unless_a_single_wave_has_room_to_halve_them():
    """Against times of an H100: 6144 x 4096 at 256 tokens 26.9 us, halved 22.7; 3584 x 18944 at 512 86.2 and 78.8."""
    unsigned = MosaicGpuConfig(128, 2, 4, 4, parts=1, unsigned=True)
    for tokens, n, k, whole, halved in ((256, 6144, 4096, 26.9, 22.7), (512, 3584, 18944, 86.2, 78.8)):
        assert configs.waves(unsigned, problem(tokens, n, k, 0.1)) == 1
        extra = mosaic_gpu_config.extra_of_8_bits(k // 128, 128)
        assert (halved - configs.RAMP) * (1 + extra) + configs.RAMP == pytest.approx(whole, rel=0.05)
    # 132 tiles, 16 of them of 8 bits: no room. And with one kind of tiles there is nothing to tell apart.
    assert configs.waves(unsigned, problem(512, 4096, 4096, 0.1)) == pytest.approx(1.25, abs=0.01)
    assert (
        configs.waves(unsigned, problem(512, 4096, 4096)) == configs.waves(unsigned, problem(512, 4096, 4096, 1)) == 1
    )


def test_the_rule_takes_unsigned_operands_where_a_single_wave_has_room():
    assert mosaic_gpu_config.default(problem(128, 14336, 4096, 0.1)) == MosaicGpuConfig(128, 2, 4, 4, 1, 8, True)
    assert mosaic_gpu_config.default(problem(256, 6144, 4096, 0.1)).unsigned
    assert not mosaic_gpu_config.default(problem(256, 6144, 4096)).unsigned
    assert not mosaic_gpu_config.default(problem(128, 4096, 4096, 0.1)).unsigned


def test_tuned_entries_count_for_weights_with_about_as_many_8_bit_channels(table):
    table(
        configs.Entry(512, 4096, 4096, 128, 0.1, NARROW, 50.0),
        configs.Entry(512, 4096, 4096, 128, 1.0, WIDE, 40.0),
    )
    for n8 in (410, 416, 512):
        assert configs.choose(Problem(512, 4096, 128, 4096 - n8, n8), "NVIDIA H100 80GB HBM3", "mosaic_gpu") is NARROW
    assert configs.choose(problem(512, 4096, 4096, 1.0), "NVIDIA H100 80GB HBM3", "mosaic_gpu") is WIDE


def test_the_implementation_with_the_lower_estimate_comes_first(table):
    table(
        configs.Entry(1, 4096, 4096, 128, 0.0, TRITON, 6.0),
        configs.Entry(1, 28672, 4096, 128, 0.0, MosaicGpuConfig(8, 1, 8, 4, parts=1), 25.0),
    )
    assert configs.by_speed(problem(1, 4096, 4096), "NVIDIA H100 80GB HBM3") == ("triton", "mosaic_gpu")
    assert configs.by_speed(problem(1, 28672, 4096), "NVIDIA H100 80GB HBM3") == ("mosaic_gpu", "triton")
    # Without any entry, the number of tokens decides.
    table()
    assert configs.by_speed(problem(8, 4096, 4096), "NVIDIA H100 80GB HBM3")[0] == "triton"
    assert configs.by_speed(problem(9, 4096, 4096), "NVIDIA H100 80GB HBM3")[0] == "mosaic_gpu"


def test_other_group_sizes_use_the_entries_there_are(table):
    table(configs.Entry(1, 4096, 4096, 128, 0.0, TRITON, 6.0))
    assert configs.choose(problem(1, 4096, 4096, group_size=64), "NVIDIA H100 80GB HBM3") is TRITON


@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe"])
def test_relatives_of_the_h100_use_its_table(kind: str):
    assert configs.read_table(kind) == configs.read_table("NVIDIA H100 80GB HBM3")


def test_unknown_devices_have_a_rule():
    assert configs.read_table("NVIDIA A100-SXM4-80GB") == ()
    assert isinstance(configs.choose(problem(4, 999, 4096), "unknown"), FewTokensConfig)
    assert isinstance(configs.choose(problem(400, 999, 4096), "unknown"), ManyTokensConfig)
    assert isinstance(configs.choose(problem(400, 999, 4096), "unknown", "mosaic_gpu"), MosaicGpuConfig)


def test_traits_are_those_of_the_data_sheets_and_unknown_devices_are_said_once():
    assert traits_of("NVIDIA H100 80GB HBM3") == DeviceTraits(132, 3.35e12)
    assert traits_of("NVIDIA H100 PCIe").multiprocessors == 114
    assert traits_of("NVIDIA A100-SXM4-40GB").bandwidth < traits_of("NVIDIA A100-SXM4-80GB").bandwidth
    assert traits_of("NVIDIA GH200 480GB") != traits_of("NVIDIA H200")
    assert traits_of("NVIDIA L40S") != traits_of("NVIDIA L4")
    traits_of.cache_clear()
    with pytest.warns(UserWarning, match="'My GPU' is no GPU that pallas_kernels.device_traits knows"):
        assert traits_of("My GPU") == UNKNOWN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traits_of("My GPU")


def test_the_rule_reckons_with_the_device_of_the_table(table):
    """On the 58 multiprocessors of an L4, 264 programs of 8 warps are more than one wave; on an H100 they are one."""
    wide, narrow = (FewTokensConfig(rows, 8, 8, 1, 1, "none") for rows in (32, 16))
    table(
        configs.Entry(1, 1856, 4096, 128, 0.0, narrow, 10.0),  # one wave of an L4: 116 programs
        configs.Entry(1, 1856, 4096, 128, 0.0, wide, 10.1),
    )
    assert configs.waves(narrow, problem(1, 4224, 4096)) == 1
    assert configs.waves(narrow, problem(1, 4224, 4096), 58) == pytest.approx(264 / 116)
    [entry, _] = configs.read_table("")
    estimate = configs._estimate(problem(1, 4224, 4096), entry, traits_of("NVIDIA L4"))
    assert estimate == pytest.approx(2 + 8 * 264 / 116)


def test_a_written_table_is_read_back_and_updated(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuned_table, "TABLE_DIR", tmp_path)
    configs.read_table.cache_clear()
    first = configs.Entry(1, 4096, 4096, 128, 0.1, TRITON, 6.0)
    other = configs.Entry(1, 4096, 4096, 128, 0.1, NARROW, 7.0)
    faster = configs.Entry(1, 4096, 4096, 128, 0.1, FewTokensConfig(32, 8, 8, 1, 1, "none"), 5.0)
    path = tuned_table.write_table("My GPU", [first, other], {"jax": "1"})
    assert configs.read_table("My GPU") in ((first, other), (other, first))
    tuned_table.write_table("My GPU", [faster], {"jax": "1"})
    assert set(configs.read_table("My GPU")) == {faster, other}
    assert json.loads(path.read_text())["device_kind"] == "My GPU"
    configs.read_table.cache_clear()


@pytest.mark.parametrize("entry", configs.read_table("NVIDIA H100 80GB HBM3"), ids=str)
def test_every_entry_of_the_shipped_table_is_chosen_for_its_case(entry: configs.Entry):
    assert configs.choose(entry.problem, "NVIDIA H100 80GB HBM3", entry.implementation) == entry.config
