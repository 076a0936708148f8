# Vivado, 2022.1 and later: the kernel in a block design for a board, to a bitstream.
#
#   vivado -mode batch -source overlay.tcl
#
# The Makefile runs this in the build folder of the design, which holds ip/. Makes kgrc.bit,
# kgrc.hwh, reports/{utilization,timing}.rpt and vivado.version. With KGRC_STEP = look it only looks
# whether this Vivado has the part, the board files and the blocks that are needed. What is different
# from board to board comes from accelerator/build.py. Never run by Vivado; a test runs it in tclsh
# with stubs for the tool's commands.

proc setting {name} {
  if {![info exists ::env($name)] || $::env($name) eq ""} {
    error "$name is not set; run this file through the Makefile of hls_src"
  }
  return $::env($name)
}

set board [setting KGRC_BOARD]
# vendor and name, without a version: that of the board files differs from Vivado to Vivado
set board_name [setting KGRC_BOARD_PART]
set clock_mhz [setting KGRC_CLOCK_MHZ]
set port_clock_mhz [setting KGRC_PORT_CLOCK_MHZ]
# port of the processing system -> the kernel's memory ports: memory_ports in accelerator/header.py
set ports [setting KGRC_PORTS]
set limit_minutes 1200

# The newest version of a kind of block in the catalogue.
proc newest {kind} {
  set found [lindex [lsort -dictionary [get_ipdefs -all $kind:*]] end]
  if {$found eq ""} {
    error "no $kind in the catalogue of this Vivado"
  }
  return $found
}

# A cell of the block design.
proc make_cell {name kind {config {}}} {
  set cell [create_bd_cell -type ip -vlnv [newest $kind] $name]
  if {[llength $config]} {
    set_property -dict $config $cell
  }
}

# Connects masters to one slave through a smartconnect, which converts widths and clocks.
proc join_ports {name masters slave} {
  make_cell $name xilinx.com:ip:smartconnect \
    [list CONFIG.NUM_SI [llength $masters] CONFIG.NUM_MI 1 CONFIG.NUM_CLKS 2]
  set number 0
  foreach master $masters {
    connect_bd_intf_net [get_bd_intf_pins $master] \
      [get_bd_intf_pins $name/[format S%02d_AXI $number]]
    incr number
  }
  connect_bd_intf_net [get_bd_intf_pins $name/M00_AXI] [get_bd_intf_pins $slave]
}

# The AXI masters of the kernel that carry some of its memory ports: ports of a bundle share one.
proc masters_of {memory_ports} {
  set file [open [setting KGRC_SOURCES]/top.cpp]
  set text [read $file]
  close $file
  set found {}
  foreach port $memory_ports {
    if {![regexp "m_axi port = $port\\y\[^\n\]* bundle = (\\w+)" $text whole bundle]} {
      error "top.cpp has no m_axi interface for $port of KGRC_PORTS"
    }
    set master kgrc_run_0/m_axi_$bundle
    if {$master ni $found} {
      lappend found $master
    }
  }
  return $found
}

# The newest board part of a vendor and name; "" if there is none. Vendors write names in both cases.
proc board_part_of {name} {
  foreach part [get_board_parts -latest_file_version] {
    if {[string match -nocase $name:* $part]} {
      return $part
    }
  }
}

# a part that is not installed, or not licensed, ends here
create_project -force kgrc vivado -part [setting KGRC_PART]
if {[board_part_of $board_name] eq ""} {
  # in batch mode Vivado may not look where its store puts board files
  catch {
    set store [xhub::get_xstores xilinx_board_store]
    set_param board.repoPaths [get_property LOCAL_ROOT_DIR $store]
  }
}
set board_part [board_part_of $board_name]
if {$board_part eq ""} {
  error "no board files of $board ($board_name): install them (Vivado, Tools, Vivado Store, Boards)"
}
set_property board_part $board_part [current_project]
if {[setting KGRC_STEP] eq "look"} {
  foreach kind {
    zynq_ultra_ps_e proc_sys_reset smartconnect dfx_axi_shutdown_manager xlconcat axi_intc
  } {
    newest xilinx.com:ip:$kind
  }
  exit
}
set_property ip_repo_paths [file normalize ip] [current_project]
update_ip_catalog

create_bd_design kgrc

# The processing system stays at the top level: pynq finds it only there. The preset of the board
# part sets up the DDR memory; that of a KV260 is of its module, without the carrier, whose SD card,
# UART, USB and Ethernet the boot firmware has set up before. The kernel accesses it through ports of 128 bits, their full width, with a clock of
# their own; one more port accesses the registers. HPC0 and HPC1 are used as plain ports: AxCACHE of
# an HLS master asks for no coherency.
make_cell ps xilinx.com:ip:zynq_ultra_ps_e
apply_bd_automation -rule xilinx.com:bd_rule:zynq_ultra_ps_e -config {apply_board_preset 1} \
  [get_bd_cells ps]
set config [list \
  CONFIG.PSU__FPGA_PL0_ENABLE 1 \
  CONFIG.PSU__CRL_APB__PL0_REF_CTRL__FREQMHZ $clock_mhz \
  CONFIG.PSU__FPGA_PL1_ENABLE 1 \
  CONFIG.PSU__CRL_APB__PL1_REF_CTRL__FREQMHZ $port_clock_mhz \
  CONFIG.PSU__USE__M_AXI_GP0 1 \
  CONFIG.PSU__USE__M_AXI_GP1 0 \
  CONFIG.PSU__USE__M_AXI_GP2 0 \
  CONFIG.PSU__USE__IRQ0 1 \
]
foreach {port number} {HPC0 0 HPC1 1 HP0 2 HP1 3 HP2 4 HP3 5} {
  if {[dict exists $ports $port]} {
    lappend config CONFIG.PSU__USE__S_AXI_GP$number 1 CONFIG.PSU__SAXIGP${number}__DATA_WIDTH 128
  } else {
    lappend config CONFIG.PSU__USE__S_AXI_GP$number 0
  }
}
set_property -dict $config [get_bd_cells ps]

make_cell kgrc_run_0 pynq-kgrc:hls:kgrc_run
make_cell reset xilinx.com:ip:proc_sys_reset
make_cell reset_ports xilinx.com:ip:proc_sys_reset
# pynq traces an interrupt only through a concat and an interrupt controller
make_cell xlconcat_0 xilinx.com:ip:xlconcat {CONFIG.NUM_PORTS 1}
make_cell axi_intc_0 xilinx.com:ip:axi_intc {CONFIG.C_IRQ_CONNECTION 1}

# Memory ports. A shutdown manager before each port ends its open bursts when asked to, so that the
# logic can be programmed while a kernel hangs; pynq and our driver ask it.
dict for {port memory_ports} $ports {
  make_cell shutdown_$port xilinx.com:ip:dfx_axi_shutdown_manager {
    CONFIG.RP_IS_MASTER true CONFIG.CTRL_INTERFACE_TYPE 1 CONFIG.RESET_ACTIVE_LEVEL 0
    CONFIG.DP_PROTOCOL AXI4MM CONFIG.DP_AXI_DATA_WIDTH 128 CONFIG.DP_AXI_ADDR_WIDTH 49
  }
  join_ports smartconnect_$port [masters_of $memory_ports] shutdown_$port/S_AXI
  connect_bd_intf_net [get_bd_intf_pins shutdown_$port/M_AXI] \
    [get_bd_intf_pins ps/S_AXI_${port}_FPD]
}

# Registers of the kernel, of the interrupt controller and of the shutdown managers.
set slaves {kgrc_run_0/s_axi_control axi_intc_0/s_axi}
set segments {kgrc_run_0/s_axi_control/Reg axi_intc_0/S_AXI/Reg}
foreach port [dict keys $ports] {
  lappend slaves shutdown_$port/S_AXI_CTRL
  lappend segments shutdown_$port/S_AXI_CTRL/Reg
}
make_cell smartconnect_control xilinx.com:ip:smartconnect \
  [list CONFIG.NUM_SI 1 CONFIG.NUM_MI [llength $slaves] CONFIG.NUM_CLKS 2]
connect_bd_intf_net [get_bd_intf_pins ps/M_AXI_HPM0_FPD] \
  [get_bd_intf_pins smartconnect_control/S00_AXI]
set number 0
foreach slave $slaves {
  connect_bd_intf_net [get_bd_intf_pins smartconnect_control/[format M%02d_AXI $number]] \
    [get_bd_intf_pins $slave]
  incr number
}

connect_bd_net [get_bd_pins kgrc_run_0/interrupt] [get_bd_pins xlconcat_0/In0]
connect_bd_net [get_bd_pins xlconcat_0/dout] [get_bd_pins axi_intc_0/intr]
connect_bd_net [get_bd_pins axi_intc_0/irq] [get_bd_pins ps/pl_ps_irq0]

# Two clocks, each with its reset: one of the kernel and its registers, one of the memory ports.
set kernel_clocked {
  kgrc_run_0/ap_clk axi_intc_0/s_axi_aclk reset/slowest_sync_clk smartconnect_control/aclk
  ps/maxihpm0_fpd_aclk
}
set kernel_resetted {kgrc_run_0/ap_rst_n axi_intc_0/s_axi_aresetn smartconnect_control/aresetn}
set port_clocked {reset_ports/slowest_sync_clk smartconnect_control/aclk1}
set port_resetted {}
foreach port [dict keys $ports] {
  lappend kernel_clocked smartconnect_$port/aclk
  lappend kernel_resetted smartconnect_$port/aresetn
  lappend port_clocked smartconnect_$port/aclk1 shutdown_$port/clk
  lappend port_clocked ps/saxi[string tolower $port]_fpd_aclk
  lappend port_resetted shutdown_$port/resetn
}
foreach {clock clocked} [list ps/pl_clk0 $kernel_clocked ps/pl_clk1 $port_clocked] {
  foreach pin $clocked {
    connect_bd_net [get_bd_pins $clock] [get_bd_pins $pin]
  }
}
foreach {reset resetted} [list reset $kernel_resetted reset_ports $port_resetted] {
  connect_bd_net [get_bd_pins ps/pl_resetn0] [get_bd_pins $reset/ext_reset_in]
  foreach pin $resetted {
    connect_bd_net [get_bd_pins $reset/peripheral_aresetn] [get_bd_pins $pin]
  }
}

# Registers at fixed addresses; all memory for the kernel.
set address 0xA0000000
foreach segment $segments {
  assign_bd_address -offset [format 0x%08X $address] -range 0x00010000 \
    -target_address_space [get_bd_addr_spaces ps/Data] [get_bd_addr_segs $segment]
  incr address 0x10000
}
assign_bd_address
# pynq may allocate above 4 GiB; a port that cannot address it would read other memory
foreach space [get_bd_addr_spaces kgrc_run_0/*] {
  set segments [get_bd_addr_segs -of_objects $space]
  if {![string match *DDR_LOW* $segments] || ![string match *DDR_HIGH* $segments]} {
    error "$space does not reach all memory, only: $segments"
  }
}

validate_bd_design
save_bd_design
set design [get_files kgrc.bd]
generate_target all $design
add_files -norecurse [make_wrapper -files $design -top]
set_property top kgrc_wrapper [current_fileset]
update_compile_order -fileset sources_1

launch_runs impl_1 -to_step write_bitstream -jobs [setting KGRC_JOBS]
wait_on_run -timeout $limit_minutes impl_1
if {[get_property PROGRESS [get_runs impl_1]] ne "100%"} {
  error "no bitstream: [get_property STATUS [get_runs impl_1]]; see vivado/kgrc.runs"
}
open_run impl_1
file mkdir reports
report_utilization -file reports/utilization.rpt
report_timing_summary -file reports/timing.rpt
foreach slack {WNS WHS} {
  set found [get_property STATS.$slack [get_runs impl_1]]
  if {$found < 0} {
    error "timing is not met at $clock_mhz MHz (kernel) and $port_clock_mhz MHz (memory ports):\
      $slack is $found ns; see reports/timing.rpt"
  }
}

set version [open vivado.version w]
puts $version "Vivado [version -short]"
close $version
file copy -force [lindex [glob vivado/kgrc.gen/sources_1/bd/kgrc/hw_handoff/kgrc.hwh] 0] kgrc.hwh
# last and in one step: the Makefile takes kgrc.bit as the sign of success
file copy -force [get_property DIRECTORY [get_runs impl_1]]/kgrc_wrapper.bit kgrc.bit.part
file rename -force kgrc.bit.part kgrc.bit
exit
