// A bank of a region: a block RAM with two ports. Each reads or writes; a read takes one edge.
module region_bank #(
  parameter ROWS = 1024, WIDTH = 64, ROW = 10
) (
  input clk, step,
  input write_a, write_b,
  input [ROW-1:0] row_a, row_b,
  input [WIDTH-1:0] in_a, in_b,
  output reg [WIDTH-1:0] out_a, out_b
);
  reg [WIDTH-1:0] cells [0:ROWS-1];
  always @(posedge clk) if (step) begin
    out_a <= cells[row_a];
    if (write_a) cells[row_a] <= in_a;
  end
  always @(posedge clk) if (step) begin
    out_b <= cells[row_b];
    if (write_b) cells[row_b] <= in_b;
  end
endmodule
