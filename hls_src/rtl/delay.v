// A shift register: gives each value CYCLES steps later.
module delay #(
  parameter WIDTH = 1, CYCLES = 1
) (
  input clk, step,
  input [WIDTH-1:0] in,
  output [WIDTH-1:0] out
);
  reg [WIDTH*CYCLES-1:0] kept;
  always @(posedge clk) if (step) kept <= {kept, in};
  assign out = kept[WIDTH*CYCLES-1 -: WIDTH];
endmodule
