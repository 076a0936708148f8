// One lane of pack_output() in ../pool.cpp: the largest code of a window, kept until its last code
// has come. Two clocks.
//
// A row that was written one or two clocks before is taken from the registers on its way to the
// memory: reading, comparing and writing takes longer than a trip.
module pool_lane #(
  parameter ROWS = 512, ROW = 9
) (
  input clk,
  input mine, starts,              // the lane takes part; its window begins
  input [ROW-1:0] row,
  input signed [15:0] code,
  output reg signed [15:0] largest
);
  reg signed [15:0] kept [0:ROWS-1];
  reg signed [15:0] read, code1, late;
  reg [ROW-1:0] row1, row2, row3;
  reg mine1, mine2, mine3, starts1;
  wire signed [15:0] old = mine2 && row2 == row1 ? largest :
                           mine3 && row3 == row1 ? late : read;
  wire larger = starts1 || code1 > old;
  always @(posedge clk) begin
    read <= kept[row];
    code1 <= code;
    row1 <= row;
    mine1 <= mine;
    starts1 <= starts;
    largest <= mine1 && larger ? code1 : old;
    row2 <= row1;
    mine2 <= mine1;
    late <= largest;
    row3 <= row2;
    mine3 <= mine2;
    if (mine2) kept[row2] <= largest;
  end
endmodule
