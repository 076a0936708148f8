"""Overlay files for the simulated board: a design as JSON for a bitstream, and a minimal .hwh."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from xml.sax.saxutils import quoteattr

import msgspec

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.header import (
    IMAGE_VERSION,
    MANAGER,
    REGISTERS,
    VLNV,
    memory_ports,
)
from pynq_kgrc.backends.board.overlays import BIT, HWH, MANIFEST, Manifest

KERNEL_AT, CONTROLLER_AT = 0xA000_0000, 0xA001_0000
"""Physical addresses of the registers of the kernel and of the interrupt controller."""

MANAGERS_AT = {port: 0xA002_0000 + 0x1_0000 * i for i, port in enumerate(memory_ports())}
"""Port of the processing system -> physical address of its shutdown manager's register."""

PORT_MHZ = 300.0


def write_overlay(
    folder: Path, config: AcceleratorConfig, clock_mhz: float = 150.0, interrupt: bool = True
) -> Path:
    """Write an overlay for the simulated board; returns the path of its `kgrc.bit`.

    The .hwh holds only what pynq needs, made from `header.REGISTERS`; it is not Vivado's output.
    `kgrc.bit` is the design as JSON, not a bitstream.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BIT).write_text(json.dumps(asdict(config)))
    (folder / HWH).write_text(hardware_handoff(clock_mhz, interrupt))
    sums = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in (BIT, HWH)}
    manifest = Manifest(
        config,
        config.digest,
        clock_mhz,
        sums,
        "simulated, no bitstream",
        program_version=IMAGE_VERSION,
    )
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return folder / BIT


def hardware_handoff(clock_mhz: float, interrupt: bool) -> str:
    """The text of a .hwh: the kernel, the processor and, if asked for, the interrupt path."""
    registers = "".join(
        f'<REGISTER NAME="{name}"><PROPERTY NAME="ADDRESS_OFFSET" VALUE="{offset:#x}"/>'
        f'<PROPERTY NAME="SIZE" VALUE="32"/><PROPERTY NAME="ACCESS" VALUE="read-write"/></REGISTER>'
        for name, offset in REGISTERS.items()
    )
    block = f"""<ADDRESSBLOCKS><ADDRESSBLOCK ACCESS="read-write" INTERFACE="s_axi_control"
      NAME="Reg" RANGE="65536" USAGE="register"><REGISTERS>{registers}</REGISTERS></ADDRESSBLOCK>
      </ADDRESSBLOCKS>"""
    line = _ports(_port("O", "interrupt", "xlconcat_0", "In0", interrupt))
    kernel = block + line + _slave("control")
    modules = [_module("kgrc_run_0", "kgrc_run", VLNV, kernel)]
    ranges = [("kgrc_run_0", "s_axi_control", KERNEL_AT)]
    if interrupt:
        concat = _ports(
            _port("I", "In0", "kgrc_run_0", "interrupt"), _port("O", "dout", "axi_intc_0", "intr")
        )
        controller = _ports(
            _port("I", "intr", "xlconcat_0", "dout"),
            _port("O", "irq", "zynq_ultra_ps_e_0", "pl_ps_irq0"),
        )
        modules += [
            _module("xlconcat_0", "xlconcat", "xilinx.com:ip:xlconcat:2.1", concat),
            _module(
                "axi_intc_0",
                "axi_intc",
                "xilinx.com:ip:axi_intc:4.1",
                controller + _slave(""),
                'MODCLASS="INTERRUPT_CNTLR"',
            ),
        ]
        ranges.append(("axi_intc_0", "s_axi", CONTROLLER_AT))
    for port, base in MANAGERS_AT.items():
        modules.append(
            _module(
                f"shutdown_{port}", "dfx_axi_shutdown_manager", MANAGER, _slave("CTRL", "S_AXI")
            )
        )
        ranges.append((f"shutdown_{port}", "S_AXI_CTRL", base))
    modules.append(_processor((clock_mhz, PORT_MHZ), ranges, interrupt))
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        "<!-- Only what pynq needs; for the simulated board. -->\n"
        '<EDKSYSTEM EDWVERSION="1.2" TIMESTAMP="simulated" VIVADOVERSION="simulated">\n'
        '<SYSTEMINFO ARCH="zynquplus" DEVICE="xczu9eg" NAME="kgrc" PACKAGE="ffvb1156"/>\n'
        f"<EXTERNALPORTS/><EXTERNALINTERFACES/>\n<MODULES>\n{''.join(modules)}</MODULES>\n"
        "</EDKSYSTEM>\n"
    )


def _module(name: str, kind: str, vlnv: str, inside: str, more: str = "") -> str:
    return (
        f'<MODULE FULLNAME="/{name}" HWVERSION="1.0" INSTANCE="{name}" IPTYPE="PERIPHERAL" '
        f'IS_ENABLE="1" MODTYPE="{kind}" VLNV={quoteattr(vlnv)} {more}>\n{inside}\n</MODULE>\n'
    )


def _ports(*ports: str) -> str:
    return f"<PORTS>{''.join(ports)}</PORTS>"


def _port(direction: str, name: str, instance: str, port: str, wired: bool = True) -> str:
    """An interrupt port; if `wired`, connected to `port` of the module `instance`."""
    wire = f'<CONNECTION INSTANCE="{instance}" PORT="{port}"/>' if wired else ""
    return (
        f'<PORT DIR="{direction}" NAME="{name}" SIGIS="INTERRUPT">'
        f"<CONNECTIONS>{wire}</CONNECTIONS></PORT>"
    )


def _slave(name: str, kind: str = "s_axi") -> str:
    """The AXI slave interface `s_axi`, or `s_axi_NAME`."""
    return (
        f'<BUSINTERFACES><BUSINTERFACE NAME="{kind}{"_" * bool(name)}{name}" TYPE="SLAVE" '
        f'VLNV="xilinx.com:interface:aximm:1.0"/></BUSINTERFACES>'
    )


def _processor(
    clocks: tuple[float, float], ranges: list[tuple[str, str, int]], interrupt: bool
) -> str:
    values: dict[str, object] = {}
    for i in range(4):
        clock_mhz = clocks[min(i, 1)]
        values[f"PSU__FPGA_PL{i}_ENABLE"] = int(i < len(clocks))
        clock = f"PSU__CRL_APB__PL{i}_REF_CTRL__"
        values |= {f"{clock}DIVISOR0": round(1500 / clock_mhz), f"{clock}DIVISOR1": 1}
        values[f"{clock}SRCSEL"] = "IOPLL"
        values[f"{clock}ACT_FREQMHZ"] = clock_mhz
    parameters = "".join(f'<PARAMETER NAME="{n}" VALUE="{v}"/>' for n, v in values.items())
    memory = "".join(
        f'<MEMRANGE ADDRESSBLOCK="Reg" BASENAME="C_BASEADDR" BASEVALUE="{base:#x}" '
        f'HIGHNAME="C_HIGHADDR" HIGHVALUE="{base + 0xFFFF:#x}" INSTANCE="{name}" '
        f'MASTERBUSINTERFACE="M_AXI_HPM0_FPD" MEMTYPE="REGISTER" SLAVEBUSINTERFACE="{port}"/>'
        for name, port, base in ranges
    )
    inside = (
        f"<PARAMETERS>{parameters}</PARAMETERS>"
        + _ports(_port("I", "pl_ps_irq0", "axi_intc_0", "irq", interrupt))
        + '<BUSINTERFACES><BUSINTERFACE NAME="M_AXI_HPM0_FPD" TYPE="MASTER" '
        'VLNV="xilinx.com:interface:aximm:1.0"/></BUSINTERFACES>'
        f"<MEMORYMAP>{memory}</MEMORYMAP>"
    )
    vlnv = "xilinx.com:ip:zynq_ultra_ps_e:3.5"
    # pynqmetadata before 0.2 knows the processing system by this mark, as Vivado sets it
    return _module("zynq_ultra_ps_e_0", "zynq_ultra_ps_e", vlnv, inside, 'IS_PL="FALSE"')
