# Vivado, 2022.1 and later: the kernel in a block design for a ZCU102, to a bitstream.
#
#   vivado -mode batch -source overlay.tcl
#
# The Makefile runs this in the build folder of the design, which holds ip/. Makes kgrc.bit,
# kgrc.hwh, reports/{utilization,timing}.rpt and vivado.version. Needs the board files of the ZCU102
# for the settings of its memory. Never run by Vivado; a test runs it in tclsh with stubs for the
# tool's commands.

proc setting {name} {
  if {![info exists ::env($name)]} {
    error "$name is not set; run this file through the Makefile of hls_src"
  }
  return $::env($name)
}

set board [setting KGRC_BOARD]
set clock_mhz [setting KGRC_CLOCK_MHZ]
set limit_minutes 1200

# A cell of the block design, in the newest version of the catalogue.
proc make_cell {name kind {config {}}} {
  set found [lindex [lsort -dictionary [get_ipdefs -all $kind:*]] end]
  if {$found eq ""} {
    error "no $kind in the catalogue of this Vivado"
  }
  set cell [create_bd_cell -type ip -vlnv $found $name]
  if {[llength $config]} {
    set_property -dict $config $cell
  }
  return $cell
}

# Connects masters to one slave port through a smartconnect, which converts widths.
proc join_ports {name masters slave} {
  make_cell $name xilinx.com:ip:smartconnect \
    [list CONFIG.NUM_SI [llength $masters] CONFIG.NUM_MI 1 CONFIG.NUM_CLKS 1]
  set number 0
  foreach master $masters {
    connect_bd_intf_net [get_bd_intf_pins $master] \
      [get_bd_intf_pins $name/[format S%02d_AXI $number]]
    incr number
  }
  connect_bd_intf_net [get_bd_intf_pins $name/M00_AXI] [get_bd_intf_pins $slave]
}

create_project -force kgrc vivado -part [setting KGRC_PART]
set board_part [lindex [get_board_parts -latest_file_version *:$board:*] 0]
if {$board_part eq ""} {
  error "no board files of $board: install them (Vivado, Tools, Vivado Store, Boards)"
}
set_property board_part $board_part [current_project]
set_property ip_repo_paths [file normalize ip] [current_project]
update_ip_catalog

create_bd_design kgrc

# The processing system stays at the top level: pynq finds it only there. The board preset sets up
# the DDR memory. Four high-performance ports of 128 bits, their full width, access it; one
# port accesses the registers.
make_cell ps xilinx.com:ip:zynq_ultra_ps_e
apply_bd_automation -rule xilinx.com:bd_rule:zynq_ultra_ps_e -config {apply_board_preset 1} \
  [get_bd_cells ps]
set_property -dict [list \
  CONFIG.PSU__FPGA_PL0_ENABLE 1 \
  CONFIG.PSU__CRL_APB__PL0_REF_CTRL__FREQMHZ $clock_mhz \
  CONFIG.PSU__USE__M_AXI_GP0 1 \
  CONFIG.PSU__USE__M_AXI_GP1 0 \
  CONFIG.PSU__USE__M_AXI_GP2 0 \
  CONFIG.PSU__USE__S_AXI_GP2 1 CONFIG.PSU__SAXIGP2__DATA_WIDTH 128 \
  CONFIG.PSU__USE__S_AXI_GP3 1 CONFIG.PSU__SAXIGP3__DATA_WIDTH 128 \
  CONFIG.PSU__USE__S_AXI_GP4 1 CONFIG.PSU__SAXIGP4__DATA_WIDTH 128 \
  CONFIG.PSU__USE__S_AXI_GP5 1 CONFIG.PSU__SAXIGP5__DATA_WIDTH 128 \
  CONFIG.PSU__USE__IRQ0 1 \
] [get_bd_cells ps]

make_cell kgrc_run_0 pynq-kgrc:hls:kgrc_run
make_cell reset xilinx.com:ip:proc_sys_reset
# pynq traces an interrupt only through a concat and an interrupt controller
make_cell xlconcat_0 xilinx.com:ip:xlconcat {CONFIG.NUM_PORTS 1}
make_cell axi_intc_0 xilinx.com:ip:axi_intc {CONFIG.C_IRQ_CONNECTION 1}

# Memory ports: the input and the weights have one each, because the array waits for them; the
# others share two. A smartconnect converts the kernel's 64 to 512 bits to 128.
foreach {port bundles} {
  HP0 {maps_in_0 maps_in_1}
  HP1 {weights_0 weights_1}
  HP2 {maps_shortcut maps_out}
  HP3 {tables items indices scales}
} {
  set masters {}
  foreach bundle $bundles {
    lappend masters kgrc_run_0/m_axi_$bundle
  }
  join_ports smartconnect_$port $masters ps/S_AXI_${port}_FPD
}

# Registers of the kernel and of the interrupt controller.
make_cell smartconnect_control xilinx.com:ip:smartconnect \
  {CONFIG.NUM_SI 1 CONFIG.NUM_MI 2 CONFIG.NUM_CLKS 1}
connect_bd_intf_net [get_bd_intf_pins ps/M_AXI_HPM0_FPD] \
  [get_bd_intf_pins smartconnect_control/S00_AXI]
connect_bd_intf_net [get_bd_intf_pins smartconnect_control/M00_AXI] \
  [get_bd_intf_pins kgrc_run_0/s_axi_control]
connect_bd_intf_net [get_bd_intf_pins smartconnect_control/M01_AXI] \
  [get_bd_intf_pins axi_intc_0/s_axi]

connect_bd_net [get_bd_pins kgrc_run_0/interrupt] [get_bd_pins xlconcat_0/In0]
connect_bd_net [get_bd_pins xlconcat_0/dout] [get_bd_pins axi_intc_0/intr]
connect_bd_net [get_bd_pins axi_intc_0/irq] [get_bd_pins ps/pl_ps_irq0]

# One clock and one reset for all.
set clocked {
  kgrc_run_0/ap_clk axi_intc_0/s_axi_aclk reset/slowest_sync_clk smartconnect_control/aclk
  ps/maxihpm0_fpd_aclk
}
set resetted {kgrc_run_0/ap_rst_n axi_intc_0/s_axi_aresetn smartconnect_control/aresetn}
foreach port {HP0 HP1 HP2 HP3} {
  lappend clocked smartconnect_$port/aclk ps/saxi[string tolower $port]_fpd_aclk
  lappend resetted smartconnect_$port/aresetn
}
foreach pin $clocked {
  connect_bd_net [get_bd_pins ps/pl_clk0] [get_bd_pins $pin]
}
connect_bd_net [get_bd_pins ps/pl_resetn0] [get_bd_pins reset/ext_reset_in]
foreach pin $resetted {
  connect_bd_net [get_bd_pins reset/peripheral_aresetn] [get_bd_pins $pin]
}

# Registers at fixed addresses; all memory for the kernel.
assign_bd_address -offset 0xA0000000 -range 0x00010000 \
  -target_address_space [get_bd_addr_spaces ps/Data] \
  [get_bd_addr_segs kgrc_run_0/s_axi_control/Reg]
assign_bd_address -offset 0xA0010000 -range 0x00010000 \
  -target_address_space [get_bd_addr_spaces ps/Data] \
  [get_bd_addr_segs axi_intc_0/S_AXI/Reg]
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
    error "timing is not met at $clock_mhz MHz: $slack is $found ns; see reports/timing.rpt"
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
