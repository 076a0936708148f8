# Vitis HLS, 2022.1 and later: C-simulation, synthesis, co-simulation and export of one design.
#
#   vitis_hls -f hls.tcl                  up to 2024.1
#   vitis-run --mode hls --tcl hls.tcl    since 2024.2
#
# The Makefile runs this in the build folder of the design, which holds config.h and vectors.bin.
# Makes ip/ (the packaged kernel) and reports/. Never run by Vitis HLS; a test runs it in tclsh with
# stubs for the tool's commands.

proc setting {name} {
  if {![info exists ::env($name)]} {
    error "$name is not set; run this file through the Makefile of hls_src"
  }
  return $::env($name)
}

set sources [setting KGRC_SOURCES]
set clock_mhz [setting KGRC_CLOCK_MHZ]
set build [pwd]
# KGRC_VITIS: ports are the vendor's class, in its C-simulation and co-simulation, too
set flags "-std=c++14 -DKGRC_VITIS -I$build -I$sources"

file delete -force ip reports
open_project -reset hls
set_top kgrc_run
foreach name {top.cpp plan.cpp memory.cpp decode.cpp schedule.cpp compute.cpp post.cpp pool.cpp} {
  add_files $sources/$name -cflags $flags
}
add_files -tb $sources/scripts/bench.cpp -cflags "$flags -Wno-unknown-pragmas"
open_solution -reset solution -flow_target vivado
set_part [setting KGRC_PART]
create_clock -period [format %.3f [expr {1000.0 / $clock_mhz}]] -name default

csim_design -O -argv "$build/vectors.bin"
csynth_design
# co-simulation gives each port a memory of its own: the bench runs tasks one by one
cosim_design -rtl verilog -argv "$build/vectors.bin apart"
# the driver finds the kernel by this name: VLNV in pynq_kgrc/accelerator/header.py
export_design -rtl verilog -format ip_catalog -vendor pynq-kgrc -library hls \
  -ipname kgrc_run -version 1.0

set solution hls/solution
file mkdir reports
foreach report [glob $solution/syn/report/*csynth.xml $solution/sim/report/*cosim.rpt] {
  file copy -force $report reports
}
# last and in one step: the Makefile takes ip/ as the sign of success
file copy -force $solution/impl/ip ip.part
file rename ip.part ip
exit
