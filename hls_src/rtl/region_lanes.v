// One read of access_regions() in ../compute.cpp: rows from lanes to banks, vectors back to lanes.
// Bank b has the input of output b - shift.
module region_lanes #(
  parameter PF = 8, BANK = 3, ROW = 10, VECTOR = 64
) (
  input clk,
  input [BANK-1:0] shift, shift_back,       // the latter some clocks later
  input [ROW-1:0] tap_row,
  input [PF*ROW-1:0] lane_rows,
  input [PF*VECTOR-1:0] first_half, second_half,
  input half,
  output reg [PF*ROW-1:0] bank_rows,
  output reg [PF*VECTOR-1:0] inputs
);
  reg [PF*ROW-1:0] rows, moved;
  reg [PF*VECTOR-1:0] read;
  // a bit of all lanes or banks, twice: it is turned by a shift
  reg [2*PF-1:0] turned;
  integer i, b;
  always @(posedge clk) begin
    for (i = 0; i < PF; i = i + 1)
      rows[i*ROW +: ROW] <= lane_rows[i*ROW +: ROW] + tap_row;
    for (b = 0; b < ROW; b = b + 1) begin
      for (i = 0; i < 2 * PF; i = i + 1) turned[i] = rows[i % PF * ROW + b];
      turned = turned << shift;
      for (i = 0; i < PF; i = i + 1) moved[i*ROW + b] = turned[PF + i];
    end
    // one row on where the place of a lane wraps around
    for (i = 0; i < PF; i = i + 1)
      bank_rows[i*ROW +: ROW] <= moved[i*ROW +: ROW] + (i < shift);
    read <= half ? second_half : first_half;
    for (b = 0; b < VECTOR; b = b + 1) begin
      for (i = 0; i < 2 * PF; i = i + 1) turned[i] = read[i % PF * VECTOR + b];
      turned = turned >> shift_back;
      for (i = 0; i < PF; i = i + 1) inputs[i*VECTOR + b] <= turned[i];
    end
  end
endmodule
