// The sums of a filter in one lane: read, add, write, one row a step.
//
//   edge 1   the cells are read       edge 3   the addend is added, or the sum cleared
//   edge 2   the RAM's own register   edge 4   the cells are written
//
// A sum that was added to or cleared may be read again 4 steps later at the earliest. That is
// MIN_FEATURE_ROWS in pynq_kgrc/accelerator/tiling.py; mac_array gets it as MIN_ROWS.
module sum_bank #(
  parameter ROWS = 64, WIDTH = 32, ROW = 6
) (
  input clk, step,
  input [ROW-1:0] row,                 // before edge 1
  input clear,
  input add,                           // before edge 3
  input signed [WIDTH-1:0] addend,
  output signed [WIDTH-1:0] sum        // before edge 3: the sum that was read
);
  reg [WIDTH-1:0] cells [0:ROWS-1];
  reg [WIDTH-1:0] read, old, next;
  reg [ROW-1:0] row1, row2, row3;
  reg clear1, clear2, write3;
  assign sum = old;
  always @(posedge clk) if (step) begin
    read <= cells[row];
    row1 <= row;
    clear1 <= clear;
    old <= read;
    row2 <= row1;
    clear2 <= clear1;
    next <= clear2 ? {WIDTH{1'b0}} : sum + addend;
    row3 <= row2;
    write3 <= clear2 || add;
    if (write3) cells[row3] <= next;
  end
endmodule
