// One lane of place_input() in ../decode.cpp: the place of a position in the region, and its vector.
// Two clocks.
//
// The place of a row and that of a position within the row are added: banks modulo PF, which is one
// comparison and one subtraction, and the carry of them into the row.
module place_lane #(
  parameter PF = 8, BANK = 3, ROW = 10, ALONG = 10, VECTOR = 64
) (
  input clk,
  input [BANK-1:0] line_bank, lane_bank,
  input [ROW-1:0] line_row, lane_row,
  input signed [ALONG:0] along,    // from the region's first position
  input [ALONG-1:0] width,         // of the region
  input kept, inside,              // its phase is needed; its row lies in the map
  input signed [ALONG:0] position, // in the map
  input [ALONG-1:0] map_width,
  input [VECTOR-1:0] beat, fill,
  output reg valid,
  output reg [BANK-1:0] bank,
  output reg [ROW-1:0] row,
  output reg [VECTOR-1:0] codes
);
  reg [BANK:0] banks;
  reg [ROW-1:0] rows;
  reg needed, known;
  reg [VECTOR-1:0] read, filler;
  wire wraps = banks >= PF;
  always @(posedge clk) begin
    banks <= line_bank + lane_bank;
    rows <= line_row + lane_row;
    needed <= kept && along >= 0 && along < $signed({1'b0, width});
    known <= inside && position >= 0 && position < $signed({1'b0, map_width});
    read <= beat;
    filler <= fill;
    valid <= needed;
    bank <= wraps ? banks - PF : banks;
    row <= rows + wraps;
    codes <= known ? read : filler;
  end
endmodule
