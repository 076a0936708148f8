// A value, CYCLES steps later.
module delay #(
  parameter WIDTH = 1, CYCLES = 1
) (
  input clk, step,
  input [WIDTH-1:0] in,
  output [WIDTH-1:0] out
);
  reg [WIDTH-1:0] kept [1:CYCLES];
  integer i;
  always @(posedge clk) if (step) begin
    kept[1] <= in;
    for (i = 2; i <= CYCLES; i = i + 1) kept[i] <= kept[i-1];
  end
  assign out = kept[CYCLES];
endmodule
