# Vitis HLS, 2022.1 and later: C-simulation, synthesis, co-simulation and export of one design.
#
#   vitis_hls -f hls.tcl                  up to 2024.1
#   vitis-run --mode hls --tcl hls.tcl    since 2024.2
#
# The Makefile runs this in the build folder of the design, which holds config.h and vectors.bin, once
# for each KGRC_STEP: synthesize (makes reports/), cosimulate, export (makes ip/, the packaged kernel).
# Between the steps it checks the II of the loops. Never run by Vitis HLS; a test runs it in tclsh with
# stubs for the tool's commands.

proc setting {name} {
  if {![info exists ::env($name)]} {
    error "$name is not set; run this file through the Makefile of hls_src"
  }
  return $::env($name)
}

set step [setting KGRC_STEP]
set sources [setting KGRC_SOURCES]
set clock_mhz [setting KGRC_CLOCK_MHZ]
set build [pwd]
set solution hls/solution
# KGRC_VITIS: ports are the vendor's class, in its C-simulation and co-simulation, too. Only config.h
# is searched for: the sources name each other's place.
set flags "-std=c++14 -DKGRC_VITIS -I$build"
# parts of the design whose memories are UltraRAMs: uram_parts in accelerator/resources.py
set uram [split [setting KGRC_URAM] ,]
if {"region" in $uram} {
  append flags " -DKGRC_REGION_URAM"
}

if {$step eq "synthesize"} {
  file delete -force ip reports
  open_project -reset hls
  set_top kgrc_run
  foreach name {
    top.cpp plan.cpp memory.cpp decode.cpp schedule.cpp compute.cpp post.cpp pool.cpp clock.cpp
  } {
    add_files $sources/$name -cflags $flags
  }
  add_files -tb $sources/scripts/bench.cpp -cflags "$flags -Wno-unknown-pragmas"
  open_solution -reset solution -flow_target vivado
  set_part [setting KGRC_PART]
  create_clock -period [format %.3f [expr {1000.0 / $clock_mhz}]] -name default
  # what routing may add to the delays that the tool schedules with: 150 MHz leave 4.87 ns
  set_clock_uncertainty 27% default
  # A pipeline that waits for a word must still hand on what it holds (flushing): with stalling ones
  # the last sums of a tile stay in `multiply` until the next tile comes, which may wait for them.
  config_compile -pipeline_style flp
  if {"memory ports" in $uram} {
    config_interface -m_axi_buffer_impl uram
  }

  csim_design -O -argv "$build/vectors.bin"
  csynth_design
  file mkdir reports.part
  foreach report [glob $solution/syn/report/*csynth.xml] {
    file copy -force $report reports.part
  }
  # last and in one step: the Makefile takes reports/ as the sign of success
  file rename reports.part reports
} else {
  open_project hls
  open_solution solution
}

if {$step eq "cosimulate"} {
  # co-simulation gives each port a memory of its own: the bench runs tasks one by one
  cosim_design -rtl verilog -argv "$build/vectors.bin apart"
  foreach report [glob $solution/sim/report/*cosim.rpt] {
    file copy -force $report reports
  }
}

if {$step eq "export"} {
  # the driver finds the kernel by this name: VLNV in pynq_kgrc/accelerator/header.py
  export_design -rtl verilog -format ip_catalog -vendor pynq-kgrc -library hls \
    -ipname kgrc_run -version 1.0
  file delete -force ip ip.part
  file copy -force $solution/impl/ip ip.part
  # last and in one step: the Makefile takes ip/ as the sign of success
  file rename ip.part ip
}
exit
