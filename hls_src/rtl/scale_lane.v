// One lane of scale() in ../post.cpp: from a sum to a code. Four clocks.
//
// Scales, shifts and limits are those of a filter or a task: they stand still while sums stream through.
// A shift of s rounds half up, (v + (1 << (s - 1))) >> s: twice v is shifted by s, then a half is
// added.
module scale_lane #(
  parameter SUM = 32, CODE = 8
) (
  input clk,
  input signed [SUM-1:0] sum, bias,
  input [14:0] mult,
  input [5:0] shift,
  input add,                       // there is a shortcut
  input signed [CODE-1:0] code, code_zero,
  input [14:0] code_mult,
  input [5:0] code_shift,
  input signed [15:0] zero, low, high,
  output reg signed [15:0] out
);
  localparam WIDE = SUM + 17;
  reg signed [SUM:0] biased;
  reg signed [CODE:0] moved;
  reg signed [WIDE-1:0] product;
  reg signed [CODE+16:0] code_product;
  reg signed [WIDE:0] scaled;
  reg signed [CODE+17:0] code_scaled;
  wire signed [WIDE:0] twice = {product, 1'b0};
  wire signed [CODE+17:0] code_twice = {code_product, 1'b0};
  wire signed [WIDE:0] shifted = twice >>> shift;
  wire signed [CODE+17:0] code_shifted = code_twice >>> code_shift;
  wire signed [WIDE:0] total = scaled + (add ? code_scaled : 0) + zero;
  always @(posedge clk) begin
    biased <= sum + bias;
    moved <= code - code_zero;
    product <= biased * $signed({1'b0, mult});
    code_product <= moved * $signed({1'b0, code_mult});
    scaled <= (shifted + 1) >>> 1;
    code_scaled <= (code_shifted + 1) >>> 1;
    out <= total < low ? low : total > high ? high : total;
  end
endmodule
