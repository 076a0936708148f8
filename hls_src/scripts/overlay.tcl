# Vivado, 2022.1 and later: the kernel in a block design for a ZCU102, to a bitstream.
#
#   vivado -mode batch -source overlay.tcl
#
# Run by the Makefile in the build folder of the design, where ip/ lies. Makes kgrc.bit, kgrc.hwh,
# reports/{utilization,timing}.rpt and vivado.version. Needs the board files of the ZCU102, for
# the settings of its memory. Not run here: there was no Vivado. What a test could do without it was
# to run this file with the tool's commands stubbed.

proc setting {name} {
  if {![info exists ::env($name)]} {
    error "$name is not set; run this file through the Makefile of hls_src"
  }
  return $::env($name)
}

set board [setting KGRC_BOARD]
set clock_mhz [setting KGRC_CLOCK_MHZ]
set limit_minutes 1200

# A cell of the block design, of the newest version that there is.
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

# Joins masters to one slave port, across widths.
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

# The processing system stays at the top: pynq finds it only there. The preset of the board knows
# the memory; four ports into it, 128 bits wide as the silicon has them; one port for the registers.
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
# pynq follows an interrupt only through a concat and a controller with a single output
make_cell xlconcat_0 xilinx.com:ip:xlconcat {CONFIG.NUM_PORTS 1}
make_cell axi_intc_0 xilinx.com:ip:axi_intc {CONFIG.C_IRQ_CONNECTION 1}

# Memory: the input and the weights, which the array waits for, have a port each; what is read
# seldom shares one. A smartconnect turns beats of the kernel (64 to 512 bits) into 128.
foreach {port bundles} {
  HP0 {maps_in}
  HP1 {weights}
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

# Registers at places that do not move from build to build; all memory for the kernel.
assign_bd_address -offset 0xA0000000 -range 0x00010000 -target_address_space [get_bd_addr_spaces ps/Data] \
  [get_bd_addr_segs kgrc_run_0/s_axi_control/Reg]
assign_bd_address -offset 0xA0010000 -range 0x00010000 -target_address_space [get_bd_addr_spaces ps/Data] \
  [get_bd_addr_segs axi_intc_0/S_AXI/Reg]
assign_bd_address
# pynq may allocate above 4 GiB; a port that does not reach there would read something else
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
# last, and whole: the Makefile takes its being there for success
file copy -force [get_property DIRECTORY [get_runs impl_1]]/kgrc_wrapper.bit kgrc.bit.part
file rename -force kgrc.bit.part kgrc.bit
exit
