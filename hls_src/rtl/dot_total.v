// Behind the cascades of a pair of filters at one position: the fields of each cascade (../dot.h), and
// the sum over the columns.
module dot_total #(
  parameter COLUMNS = 3, FIELD = 18, TOTAL = 26
) (
  input clk,
  input [COLUMNS*2*FIELD-1:0] cascades,
  output reg signed [TOTAL-1:0] low, high
);
  reg signed [TOTAL-1:0] lows, highs;
  integer k;
  always @(posedge clk) begin
    lows = 0;
    highs = 0;
    for (k = 0; k < COLUMNS; k = k + 1) begin
      lows = lows + $signed(cascades[k*2*FIELD +: FIELD]);
      // a negative field has borrowed 1 from the one above it
      highs = highs + $signed(cascades[k*2*FIELD+FIELD +: FIELD])
              + $signed({1'b0, cascades[k*2*FIELD+FIELD-1]});
    end
    low <= lows;
    high <= highs;
  end
endmodule
