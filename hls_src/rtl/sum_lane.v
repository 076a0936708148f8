// A filter and lane of access_sums() in ../compute.cpp: the total of the filter's row of the weight word
// is added to the half that is added to; the other half is handed on and cleared.
module sum_lane #(
  parameter SUM = 32, TOTAL = 26, ROWS = 4, FILTER = 3, ROW = 9
) (
  input clk,
  input [FILTER-1:0] filter,
  input [ROWS*FILTER-1:0] filters,         // of the rows of the weight word
  input [ROWS*TOTAL-1:0] totals,
  input half, adds, hands,
  input [ROW-1:0] add_row, hand_row,
  input signed [SUM-1:0] read_0, read_1,   // of the halves
  output reg [ROW-1:0] row_0, row_1,
  output reg signed [SUM-1:0] write_0, write_1,
  output reg enable_0, enable_1,
  output reg signed [SUM-1:0] handed
);
  reg signed [TOTAL-1:0] total;
  integer r;
  always @(posedge clk) begin
    total <= 0;
    for (r = 0; r < ROWS; r = r + 1)
      if (filters[r*FILTER +: FILTER] == filter) total <= totals[r*TOTAL +: TOTAL];
    row_0 <= half ? hand_row : add_row;
    row_1 <= half ? add_row : hand_row;
    enable_0 <= half ? hands : adds;
    enable_1 <= half ? adds : hands;
    write_0 <= half ? 0 : read_0 + total;
    write_1 <= half ? read_1 + total : 0;
    handed <= half ? read_0 : read_1;
  end
endmodule
