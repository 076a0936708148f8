// A DSP cascade: the sum of CHANNELS products, passed from one DSP to the next.
//
// Each DSP has a register for its inputs, one for its product and one for the sum. Channel n enters
// n steps late, so that its product is added to the sum of channels 0 to n - 1: CHANNELS + 2 steps
// in all.
module cascade #(
  parameter CHANNELS = 8, A = 27, B = 18
) (
  input clk, step,
  input [CHANNELS*A-1:0] a,
  input [CHANNELS*B-1:0] b,
  output signed [47:0] sum
);
  wire signed [47:0] sums [0:CHANNELS];
  assign sums[0] = 48'sd0;
  assign sum = sums[CHANNELS];
  genvar n;
  generate
    for (n = 0; n < CHANNELS; n = n + 1) begin : channels
      wire signed [A-1:0] a_n;
      wire signed [B-1:0] b_n;
      delay #(.WIDTH(A), .CYCLES(n + 1)) wait_a (clk, step, a[n*A +: A], a_n);
      delay #(.WIDTH(B), .CYCLES(n + 1)) wait_b (clk, step, b[n*B +: B], b_n);
      reg signed [A+B-1:0] product;
      reg signed [47:0] total;
      always @(posedge clk) if (step) begin
        product <= a_n * b_n;
        total <= sums[n] + product;
      end
      assign sums[n+1] = total;
    end
  endgenerate
endmodule
