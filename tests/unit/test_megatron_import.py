"""torch's compiler is imported when a function that Megatron-Core decorates is first called."""

import subprocess
import sys

import pytest
import torch

from megatron_ettin.megatron_import import compiling_at_first_call


def test_the_modules_of_a_run_do_not_import_the_compiler() -> None:
    program = (
        "import sys\n"
        "from megatron_ettin.megatron_import import import_megatron_core\n"
        "import_megatron_core()\n"
        "import megatron_ettin.training.set_up\n"
        "assert 'megatron.core.fusions.fused_bias_geglu' in sys.modules\n"
        "import gc\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000\n"
        "sys.exit('torch._inductor.compile_fx' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("dynamic", [None, True])
def test_what_is_decorated_is_compiled_once_at_its_first_call(dynamic: bool | None) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    before = torch.compile
    with compiling_at_first_call():

        @torch.compile(backend=backend, dynamic=dynamic)
        def plain(x: torch.Tensor) -> torch.Tensor:
            """Add one."""
            return x + 1

        class Holder:
            @torch.compile(backend=backend, dynamic=dynamic)
            def method(self, x: torch.Tensor) -> torch.Tensor:
                return x * 2

    assert torch.compile is before
    assert (plain.__name__, plain.__doc__) == ("plain", "Add one.")
    assert not graphs
    x = torch.arange(3.0)
    for _ in range(2):
        assert torch.equal(plain(x), x + 1)
        assert torch.equal(Holder().method(x), x * 2)
    assert len(graphs) == 2
